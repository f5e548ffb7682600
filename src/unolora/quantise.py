"""Backbones in 8 or 4 bits: the settings that transformers loads them with, and what does not work with them.

    int8       torchao, weights in 8 bits                     nothing else: activations stay as they are
    int4       torchao, weights in 4 bits, in groups of 32
    bnb-8bit   bitsandbytes, LLM.int8()
    bnb-4bit   bitsandbytes, NF4, in blocks                   no training on a processor, see `check_trainable`

The backbone is frozen, so only its forward, and the gradient that passes through it, are asked for. The adapter, the
hypernetwork and the heads stay in float32.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from unolora.errors import InputError

GROUP = 32


def loading(name: str) -> dict[str, Any]:
    """Return what `from_pretrained` takes beside the model's name, for one of `settings.QUANTISATIONS`.

    Raises:
        InputError: Its library is not installed.
    """
    if name == "none":
        return {}
    library = "bitsandbytes" if name.startswith("bnb") else "torchao"
    if find_spec(library) is None:
        raise InputError(f"`quantization: {name}` needs {library}, not installed here: pip install 'unolora[quant]'")
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if library == "bitsandbytes":
        if name == "bnb-8bit":
            return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if name == "int8":
        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    four_bits: Any = vars(torch)["int4"]  # not in torch's stubs
    return {"quantization_config": TorchAoConfig(IntxWeightOnlyConfig(four_bits, PerGroup(GROUP)))}


def check_trainable(backbone: nn.Module) -> None:
    """Refuse to train through weights that let no gradient pass.

    On a processor, bitsandbytes repacks 4-bit weights at the first forward without gradients, such as an evaluation.
    From then on its product has no backward, and every adapter below gets a gradient of zero without a word.

    Raises:
        InputError: The backbone has such weights.
    """
    for module in backbone.modules():
        weight: Any = getattr(module, "weight", None)
        if type(module).__name__ == "Linear4bit" and weight.device.type == "cpu":
            raise InputError(
                "bitsandbytes' 4-bit weights pass no gradient on a processor; set `quantization: int4` (torchao), or "
                "train on a GPU"
            )


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is stored in another form than as its numbers, so that nothing can be added to it."""
    return not weight.is_floating_point() or type(weight.data) is not Tensor
