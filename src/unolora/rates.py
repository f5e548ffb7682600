"""Learning rates apart, in multiples of the one that all else has: of the B's, and of the hypernetwork.

B, which starts at zero, may learn faster than A (LoRA+, Hayou et al. 2024). The B's are those of UnoLoRA and of PEFT's
LoRA, the hypernetworks those of UnoLoRA* and of HyperFormer++. The latter writes each weight as a sum of many products,
which all move in a step: at one rate for everything its adapters run away long before its heads have learned.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

UPS, HYPERNETWORKS = ("uno_B", "lora_B"), ("uno_hypernetwork", "hypernetworks")


def part(optimizer: Optimizer, model: nn.Module, of_b: float, of_hypernetwork: float) -> None:
    """Part the groups of a new optimiser by learning rate, the plain one first; schedules then scale each.

    Args:
        optimizer: Over parameters of the model, before it has taken a step.
        model: Whose names tell what a parameter is.
        of_b: Ratio of B's learning rate.
        of_hypernetwork: Ratio of the hypernetwork's.
    """
    if of_b == of_hypernetwork == 1:
        return
    ratios = {id(parameter): _ratio(name, of_b, of_hypernetwork) for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        own = {id(parameter): ratios[id(parameter)] for parameter in group["params"]}
        for ratio in sorted(set(own.values()), key=lambda ratio: (ratio != 1, ratio)):
            parameters = [parameter for parameter in group["params"] if own[id(parameter)] == ratio]
            groups.append({**group, "params": parameters, "lr": group["lr"] * ratio})
    optimizer.param_groups[:] = groups


def _ratio(name: str, of_b: float, of_hypernetwork: float) -> float:
    parts = name.split(".")
    if any(network in parts for network in HYPERNETWORKS):
        return of_hypernetwork
    return of_b if any(up in parts for up in UPS) else 1.0
