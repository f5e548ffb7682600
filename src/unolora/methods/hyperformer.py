"""HyperFormer++ (Mahabadi et al. 2021, https://arxiv.org/abs/2106.04489): adapters whose weights a network writes.

    A(y)   = y + LN(U gelu(D y + b_D) + b_U)        after each self-attention and feed-forward part
    LN(z)  = gamma * (z - mean) / std + beta        conditional: gamma and beta are written as well
    e      = LN(MLP([e_task ; e_layer ; e_place]))  place: attention or feed-forward
    D, U, b_D, b_U, gamma, beta = linear maps of e  the same ones for all layers and places

As in the published code, an encoder and a decoder each have a network of their own, every map starts at a deviation of
0.01 (so that gamma and beta start near zero, and A near the identity), and the backbone's norms are trained too.

The weights are written once for each task of the batch, for all layers together; rows pick theirs.

Axes: B batch, N rows of a layer (B, or B x beams), T tokens, D width, H width of an adapter, E of the embeddings,
U distinct tasks of a batch, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from unolora.errors import unknown
from unolora.methods.method import Method, tasks_of_rows

if TYPE_CHECKING:
    from unolora.settings import Rivals

BERT = ("attention.output.dense", "output.dense")
LLAMA = ("self_attn.o_proj", "mlp.down_proj")
T5 = ("SelfAttention.o", "DenseReluDense.wo")

PLACES: dict[str, tuple[str, str]] = {
    "bert": BERT,
    "camembert": BERT,
    "deberta": BERT,
    "deberta-v2": BERT,
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "electra": BERT,
    "gemma": LLAMA,
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "llama": LLAMA,
    "mistral": LLAMA,
    "modernbert": ("attn.Wo", "mlp.Wo"),
    "mt5": T5,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "roberta": BERT,
    "t5": T5,
    "umt5": T5,
    "xlm-roberta": BERT,
}
"""Of each family the ends of the names of the last projections of self-attention and of the feed-forward part."""

Weights = dict[str, Tensor]
"""`down` [U, L, 2, H, D], `down_bias` [.., H], `up` [.., D, H], `up_bias`, `gamma` and `beta` [.., D]."""


class HyperFormer(Method):
    """HyperFormer++ over a frozen backbone whose norms are trained.

    Args:
        backbone: The backbone.
        tasks: Names.
        rivals: The widths.

    Raises:
        InputError: It is not known where the adapters of this family belong.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence[str], rivals: Rivals) -> None:
        super().__init__(backbone.requires_grad_(False))
        config: Any = backbone.config
        E, width = rivals.hyperformer_embedding_dim, config.hidden_size
        self.places = places(backbone)
        self.task_embedding = nn.Embedding(len(tasks), E)
        self.hypernetworks = nn.ModuleDict(
            {
                stack: AdapterNetwork(width, rivals.hyperformer_dim, E, len(layers))
                for stack, layers in self.places.items()
            }
        )
        device = next(backbone.parameters()).device
        self.task_embedding.to(device)
        self.hypernetworks.to(device)
        for module in backbone.modules():
            if type(module).__name__.endswith("Norm"):
                module.requires_grad_(True)

    @contextmanager
    def condition(self, tasks: Tensor, inputs: dict[str, Any]) -> Iterator[Any]:
        """Write the weights of the batch's tasks, and hook the adapters in."""
        distinct, chosen = tasks.unique(return_inverse=True)  #            [U], [B]
        embedded = self.task_embedding(distinct)  #                        [U, E]
        with ExitStack() as hooks:
            for stack, layers in self.places.items():
                weights = self.hypernetworks[stack](embedded)
                for layer, names in enumerate(layers):
                    for place, name in enumerate(names):
                        own = {part: value[:, layer, place] for part, value in weights.items()}
                        module = self.backbone.get_submodule(name)
                        hooks.callback(module.register_forward_hook(adapter(own, chosen)).remove)
            yield self.backbone


class AdapterNetwork(nn.Module):
    """What writes the weights of all adapters of one stack of layers.

    Args:
        width: D.
        hidden: H.
        embedding_dim: E.
        layers: L.
    """

    def __init__(self, width: int, hidden: int, embedding_dim: int, layers: int) -> None:
        super().__init__()
        E = embedding_dim
        self.shapes = {
            "down": (hidden, width),
            "down_bias": (hidden,),
            "up": (width, hidden),
            "up_bias": (width,),
            "gamma": (width,),
            "beta": (width,),
        }
        self.layer_embedding = nn.Embedding(layers, E)
        self.place_embedding = nn.Embedding(2, E)
        self.combine = nn.Sequential(nn.Linear(3 * E, 2 * E), nn.ReLU(), nn.Linear(2 * E, E), nn.LayerNorm(E, eps=1e-6))
        self.write = nn.ModuleDict({name: nn.Linear(E, torch.Size(s).numel()) for name, s in self.shapes.items()})
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, tasks: Tensor) -> Weights:
        """Map task embeddings [U, E] to the weights of all adapters."""
        layer, place = self.layer_embedding.weight, self.place_embedding.weight
        U, L, E = len(tasks), len(layer), layer.shape[1]
        parts = (tasks[:, None, None], layer[None, :, None], place[None, None])
        e = self.combine(torch.cat([part.expand(U, L, 2, E) for part in parts], dim=-1))  # [U, L, 2, E]
        return {name: self.write[name](e).unflatten(-1, shape) for name, shape in self.shapes.items()}


def adapter(weights: Mapping[str, Tensor], chosen: Tensor) -> Callable[..., Tensor]:
    """Return a forward hook that puts an adapter behind a projection.

    Args:
        weights: Of this place, [U, ...] each.
        chosen: Of each sample its row of the weights [B].
    """

    def hook(_: nn.Module, __: Any, y: Tensor) -> Tensor:  # y [N, T, D]
        rows = tasks_of_rows(y, chosen)
        w = {part: value[rows] for part, value in weights.items()}
        z = torch.baddbmm(w["down_bias"][:, None], y.to(w["down"].dtype), w["down"].mT)  #        [N, T, H]
        z = torch.baddbmm(w["up_bias"][:, None], F.gelu(z, approximate="tanh"), w["up"].mT)  # [N, T, D]
        z = F.layer_norm(z, z.shape[-1:]) * w["gamma"][:, None] + w["beta"][:, None]
        return y + z.to(y.dtype)

    return hook


def places(backbone: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """Find the projections that adapters go behind.

    Returns:
        Of each stack ("encoder" and "decoder" where there are both, else "layers") and each of its layers the names of
        the last projections of self-attention and of the feed-forward part.

    Raises:
        InputError: The family is not known.
    """
    config: Any = backbone.config
    if config.model_type not in PLACES:
        raise unknown("family of backbones for HyperFormer++", config.model_type, PLACES)
    attention, feed_forward = PLACES[config.model_type]
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name, _ in backbone.named_modules():
        stack = ("decoder" if "decoder." in name else "encoder") if config.is_encoder_decoder else "layers"
        if name.endswith(f".{attention}"):
            found.setdefault(stack, ([], []))[0].append(name)
        elif name.endswith(f".{feed_forward}"):
            found.setdefault(stack, ([], []))[1].append(name)
    return {stack: list(zip(*names, strict=True)) for stack, names in found.items()}
