"""Ratios of step times on this machine: `python scripts/bench.py [rounds]`.

The models take turns within one process, round by round; of each pair the median over rounds of the ratio is shown.
MiniLM's shapes with random weights, 32 rows of 32 tokens; nothing is downloaded.
"""

import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

from unolora import UnoLoraConfig

TASKS = [f"task{i}" for i in range(32)]
SHAPE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


def backbone():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SHAPE), add_pooling_layer=False)


def step(model, inputs, *, train):
    if not train:
        with torch.no_grad():
            model(**inputs)
        return
    model(**inputs).last_hidden_state.square().mean().backward()
    model.zero_grad()


def seconds(model, inputs, *, train):
    start = time.perf_counter()
    step(model, inputs, train=train)
    return time.perf_counter() - start


def ratios(pairs, rounds, *, train):
    """Interleave all models; return the median over rounds of each one's time by the first one's."""
    for model, inputs in pairs.values():
        model.train(train)
        step(model, inputs, train=train)
    first, *_ = pairs
    found = {name: [] for name in pairs}
    for _ in range(rounds):
        times = {name: seconds(model, inputs, train=train) for name, (model, inputs) in pairs.items()}
        for name in pairs:
            found[name].append(times[name] / times[first])
    return {name: statistics.median(values) for name, values in found.items()}


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    ids = torch.randint(1000, (32, 32))
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    mixed, one = {**plain, "tasks": torch.arange(32)}, {**plain, "tasks": torch.zeros(32, dtype=torch.long)}
    lora = get_peft_model(backbone(), LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
    star = get_peft_model(backbone(), UnoLoraConfig(tasks=TASKS))
    bare = backbone()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {rounds} rounds")
    for title, train, pairs in [
        ("training step", True, {"PEFT LoRA": (lora, plain), "UnoLoRA*, 32 tasks mixed": (star, mixed)}),
        (
            "inference",
            False,
            {
                "UnoLoRA*, one task": (star, one),
                "UnoLoRA*, 32 tasks mixed": (star, mixed),
                "PEFT LoRA": (lora, plain),
                "bare backbone": (bare, plain),
            },
        ),
    ]:
        print(title)
        for name, ratio in ratios(pairs, rounds, train=train).items():
            print(f"  {name:<26}{ratio:.3f}")


if __name__ == "__main__":
    main()
