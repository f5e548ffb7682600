"""Plain LoRAs, one a task, as the start of one UnoLoRA adapter: a shared A, B and a scale for each task.

    D_t = (alpha_t / r_t) B_t A_t  ~  (alpha / R) B diag(s_t) A          for all t, at each projection

The best such A, B, s is a sum of R rank-one tensors over (output, input, task). It is found from the singular vectors
of the D_t laid beside and above each other, by alternating least squares inside them. How much of each D_t is kept,
1 - |D_t - found|^2 / |D_t|^2, is said: LoRAs that have nothing in common need a rank of the sum of theirs.

Then the hypernetwork's last maps are solved so that it gives these s; with at most d + 1 tasks it can, exactly.

Axes: T tasks, R rank, P positions, d width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from unolora import runs
from unolora.atomic import new_folder, write_json, write_text
from unolora.config import WEIGHTS_NAME, UnoLoraConfig
from unolora.errors import InputError

ROUNDS = 200
"""Of the alternating least squares."""

HOSTS: dict[str | None, str] = {
    None: "AutoModel",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's `task_type` of a LoRA -> the class of transformers that it was put on. Where none is said, the backbone's own
is tried before these."""
README = """# One adapter from {count} plain LoRAs

Made by `unolora import`. Of the LoRAs' updates it keeps, by their squared size: {kept}.

To go on training, or to predict:

```python
import unolora  # tells PEFT of the method
from peft import PeftModel
from transformers import {host}

model = {host}.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, ".", is_trainable=True)
model(**batch, tasks={tasks!r})  # a name for each row of the batch
```
"""

Pairs = dict[str, tuple[Tensor, Tensor]]
"""Projection -> (A [r, D_in], B [D_out, r] with alpha / r in it)."""


def read_lora(folder: Path) -> tuple[LoraConfig, Pairs]:
    """Read a plain LoRA.

    Raises:
        InputError: The folder holds none, or one with more to it than A and B.
    """
    file = folder / WEIGHTS_NAME
    if not (folder / "adapter_config.json").is_file() or not file.is_file():
        raise InputError(f"{folder}: expected adapter_config.json and {WEIGHTS_NAME}, as PEFT writes a LoRA")
    config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig or config.use_dora or config.rank_pattern or config.alpha_pattern:
        raise InputError(f"{folder}: expected a plain LoRA of one rank, without DoRA; found {type(config).__name__}")
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    tensors = load_file(file)
    pairs = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            pairs[name] = (A.double(), tensors[key.replace("lora_A", "lora_B")].double() * scaling)
    if 2 * len(pairs) != len(tensors):
        odd = next((key for key in tensors if ".lora_A." not in key and ".lora_B." not in key), min(tensors))
        raise InputError(f"{folder}: holds more than pairs A and B, such as {odd}; that can't be shared")
    return config, pairs


def joint(updates: Sequence[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find one pair and a scale for each of several updates B_t A_t.

    Args:
        updates: Of each task A_t [r, D_in] and B_t [D_out, r].
        rank: R.

    Returns:
        A [R, D_in], B [D_out, R] and s [T, R], so that B diag(s_t) A is near B_t A_t; of each the share kept [T].
    """
    if rank >= sum(len(A) for A, _ in updates):
        return _side_by_side(updates, rank)
    # Each D_t lies in the span of all B's and all A's, so that all is done on small cores.
    U = torch.linalg.qr(torch.cat([B for _, B in updates], dim=1))[0]  #       [D_out, u]
    V = torch.linalg.qr(torch.cat([A.T for A, _ in updates], dim=1))[0]  #     [D_in, v]
    cores = torch.stack([(U.T @ B) @ (A @ V) for A, B in updates])  #          [T, u, v]
    b = _leading(cores.permute(1, 0, 2).flatten(1), rank)  #                    [u, R]
    a = _leading(cores.permute(2, 0, 1).flatten(1), rank)  #                    [v, R]
    s = torch.zeros(len(updates), rank, dtype=cores.dtype)
    for _ in range(ROUNDS):
        s = _solve(torch.einsum("tuv,ur,vr->tr", cores, b, a), (b.T @ b) * (a.T @ a))
        b = _solve(torch.einsum("tuv,vr,tr->ur", cores, a, s), (a.T @ a) * (s.T @ s))
        a = _solve(torch.einsum("tuv,ur,tr->vr", cores, b, s), (b.T @ b) * (s.T @ s))
        b, a = b / b.norm(dim=0).clamp(min=1e-12), a / a.norm(dim=0).clamp(min=1e-12)
    s = _solve(torch.einsum("tuv,ur,vr->tr", cores, b, a), (b.T @ b) * (a.T @ a))
    found = torch.einsum("ur,tr,vr->tuv", b, s, a)
    whole = cores.square().sum(dim=(1, 2))
    kept = 1 - (cores - found).square().sum(dim=(1, 2)) / whole.clamp(min=1e-30)
    size = s.abs().mean(dim=0).clamp(min=1e-12)  # a rank's size goes to A and B, so that scales are around 1
    return (a * size.sqrt()).T @ V.T, (U @ b) * size.sqrt(), s / size, kept


def _side_by_side(updates: Sequence[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give each task ranks of its own, which keeps all; what is left over starts as in a LoRA."""
    A, B = torch.cat([A for A, _ in updates]), torch.cat([B for _, B in updates], dim=1)
    left = rank - len(A)
    generator = torch.Generator().manual_seed(0)
    more = torch.randn(left, A.shape[1], generator=generator, dtype=A.dtype) / A.shape[1] ** 0.5
    s = torch.ones(len(updates), rank, dtype=A.dtype)
    start = 0
    for task, (own, _) in enumerate(updates):
        s[:, start : start + len(own)] = 0
        s[task, start : start + len(own)] = 1
        start += len(own)
    return torch.cat([A, more]), torch.cat([B, B.new_zeros(len(B), left)], 1), s, A.new_ones(len(updates))


def import_loras(
    backbone: nn.Module, folders: Sequence[Path], names: Sequence[str] | None = None, r: int | None = None
) -> tuple[Any, dict[str, float]]:
    """Make an UnoLoRA adapter, conditioning "task", from plain LoRAs on one backbone.

    Args:
        backbone: What they were trained on.
        folders: One a task.
        names: Of the tasks; the folders' names by default.
        r: Rank of the shared pair; the largest of theirs by default.

    Returns:
        A `PeftModel` to train on or to save, and of each task the share of its updates that is kept, over all
        projections by their squared size.

    Raises:
        InputError: A folder is no plain LoRA, or they differ in their projections.
    """
    tasks = list(names or [folder.name for folder in folders])
    if len(tasks) != len(folders) or len(folders) < 2:
        raise InputError(f"give two folders or more and a name for each, got {len(folders)} and {len(tasks)}")
    read = [read_lora(folder) for folder in folders]
    places = list(read[0][1])
    for folder, (_, pairs) in zip(folders, read, strict=True):
        if pairs.keys() != read[0][1].keys():
            odd = min(pairs.keys() ^ read[0][1].keys())
            raise InputError(f"{folder}: adapts other projections than {folders[0]}, such as {odd}; import them apart")
    rank = max(config.r for config, _ in read) if r is None else r
    config = UnoLoraConfig(
        tasks=tasks,
        r=rank,
        alpha=rank,
        conditioning="task",
        target_modules=sorted(places),
        task_type=read[0][0].task_type,
        embedding_dim=max(8, len(tasks) - 1),
    )
    model = get_peft_model(backbone, config)
    tuner: Any = model.base_model
    layers = tuner.layers("default")
    scales, lost, whole = [], torch.zeros(len(tasks)), torch.zeros(len(tasks))
    with torch.no_grad():
        for place, layer in layers.items():
            updates = [pairs[place] for _, pairs in read]
            A, B, s, kept = joint(updates, rank)
            layer.uno_A["default"].copy_(A)
            layer.uno_B["default"].copy_(B)
            sizes = torch.tensor([((A_t @ A_t.T) * (B_t.T @ B_t)).sum() for A_t, B_t in updates])  # |B_t A_t|^2
            lost += (1 - kept.float()) * sizes
            whole += sizes
            scales.append(s)
        _give(tuner.uno_hypernetwork["default"], torch.stack(scales, dim=1))
    shares = 1 - lost / whole.clamp(min=1e-30)
    return model, dict(zip(tasks, shares.tolist(), strict=True))


def import_folder(
    folders: Sequence[Path],
    output: Path,
    names: Sequence[str] | None = None,
    r: int | None = None,
    backbone: str | None = None,
) -> dict[str, float]:
    """Write an adapter made by `import_loras` as a folder for `PeftModel.from_pretrained`, whole or not at all.

    Args:
        folders: Plain LoRAs, one a task.
        output: Folder to write; `kept.json` and README.md there say how much of each LoRA is kept.
        names: Of the tasks; the folders' names by default.
        r: Rank of the shared pair; the largest of theirs by default.
        backbone: A folder, a model on the hub, or "minilm"; by default the one that the LoRAs name.

    Returns:
        Of each task the share of its updates that is kept.

    Raises:
        InputError: What `import_loras` raises, the LoRAs name no common backbone or none that has their projections, or
            the output holds something.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"{output} is there already; choose another output")
    read = [read_lora(folder) for folder in folders]
    named = list(dict.fromkeys(config.base_model_name_or_path for config, _ in read))
    if backbone is None:
        if len(named) != 1 or not named[0]:
            raise InputError(
                f"the LoRAs name {' and '.join(map(repr, named))} as their backbone; say which is to be used"
            )
        backbone = named[0]
    host, model = _load(backbone, {config.task_type for config, _ in read}, read[0][1])
    adapted, kept = import_loras(model, folders, names, r)
    with new_folder(output) as temporary:
        adapted.save_pretrained(temporary)
        write_json(temporary / "kept.json", kept)
        shares = ", ".join(f"{task} {100 * share:.1f} %" for task, share in kept.items())
        filled = README.format(count=len(kept), kept=shares, host=host, base=backbone, tasks=list(kept))
        write_text(temporary / "README.md", filled)
    return kept


def _load(backbone: str, task_types: set[Any], places: Pairs) -> tuple[str, Any]:
    """Load the backbone in the class whose projections have these names; with the class's name."""
    import transformers

    where = runs.located(backbone)
    config = transformers.AutoConfig.from_pretrained(**where)
    said = [HOSTS[each] for each in task_types if each in HOSTS and each is not None]
    own = [name for name in config.architectures or [] if hasattr(transformers, name)]
    for host in dict.fromkeys([*said, *own, *HOSTS.values()]):
        kind = getattr(transformers, host)
        try:
            with torch.device("meta"):
                empty = kind.from_config(config) if host in HOSTS.values() else kind(config)
        except ValueError:  # the family has no such class
            continue
        names = {name for name, _ in empty.named_modules()}
        if places.keys() <= names:
            return host, kind.from_pretrained(**where, dtype=torch.float32)
    raise InputError(
        f"backbone {backbone!r} has no projection called {min(places)}, which the LoRAs adapt; name the one that they "
        "were trained on"
    )


def _give(hypernetwork: Any, scales: Tensor) -> None:
    """Solve the last maps S_p so that the hypernetwork gives these scales [T, P, R]."""
    T, P, _ = scales.shape
    seen: list[Tensor] = []
    hook = hypernetwork.combine.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    hypernetwork(torch.arange(T))
    hook.remove()
    e = seen[0].double()  #                                                    [T, P, d]
    ones = torch.ones(T, 1, dtype=e.dtype)
    for p in range(P):
        solved = torch.linalg.lstsq(
            torch.cat([e[:, p], ones], dim=1), scales[:, p] - hypernetwork.start, driver="gelsd"
        ).solution  #                                                          [d + 1, R]
        hypernetwork.scale_weight[p].copy_(solved[:-1].T)
        hypernetwork.scale_bias[p].copy_(solved[-1])


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors, [n, R]; random directions where there are fewer."""
    vectors = torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
    more = rank - vectors.shape[1]
    generator = torch.Generator().manual_seed(0)
    extra = torch.randn(len(vectors), more, generator=generator, dtype=vectors.dtype) / len(vectors) ** 0.5
    return torch.cat([vectors, extra], dim=1)


def _solve(right: Tensor, gram: Tensor) -> Tensor:
    """Least squares of the rows of `right` [n, R] by a gram matrix [R, R] that may be singular."""
    return right @ torch.linalg.pinv(gram, rtol=1e-10, hermitian=True)
