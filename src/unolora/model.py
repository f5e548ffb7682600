"""UnoLoRA as a PEFT method: injection, merging, and PEFT's switches.

All that knows PEFT is here and, where files are concerned, in `checkpoint.py`. `register` enters the method in PEFT's
tables, after which `get_peft_model`, `PeftModel.from_pretrained`, `save_pretrained` and the rest work as for LoRA. How
a call's tasks and samples reach the layers is in `conditioning.py`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import mapping as peft_mapping
from peft import peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from unolora import words
from unolora.checkpoint import adapter_state, check_state, naming_the_file
from unolora.conditioning import (
    Checkpointed,
    Conditioned,
    Tasks,
    input_embeddings,
    scales_of,
    task_rows,
    wrap_checkpointing,
)
from unolora.config import PEFT_TYPE, QUERY_VALUE, UnoLoraConfig, task_names
from unolora.errors import InputError, unknown
from unolora.hypernetwork import Hypernetwork
from unolora.layer import UnoLoraLayer, current_scales, scaled_by
from unolora.quantise import is_packed
from unolora.words import Descriptions

# Query and value projections, as PEFT's LoRA has them, and the families that PEFT leaves to the user.
TARGET_MODULES: dict[str, list[str] | str] = {
    **LORA_TARGETS,
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "umt5": ["q", "v"],
    "vit": ["query", "value", "q_proj", "v_proj"],  # renamed within transformers 5
}


def named_targets(
    wanted: Collection[str] | str | None, config: Mapping[str, Any], *, listed: bool = False
) -> list[str] | str:
    """Return the projections to adapt, with the backbone's own names where none were given.

    By default they are BERT's second feed-forward maps, which beat query and value in score, time and memory where it
    was measured (docs/method.md); the block's number keeps attention's own `output.dense` out. Of all other families,
    and of BERT for "query-value", they are the query and value projections.

    Args:
        wanted: Names, an expression, "all-linear", "query-value", or None for the default.
        config: The backbone's config.
        listed: Whether a default must be a list of names, for `layers_to_transform` to choose from. An expression is
            better: on a backbone of another depth it finds more or fewer, and so the mistake is seen.

    Raises:
        InputError: The family has no names here.
    """
    if wanted is not None and wanted != QUERY_VALUE:
        return wanted if isinstance(wanted, str) else list(wanted)
    family = config.get("model_type", "")
    if family == "bert" and wanted is None:
        if listed:
            return [f"{block}.output.dense" for block in range(config["num_hidden_layers"])]
        return r".*\.\d+\.output\.dense"
    if family == "deberta-v2" and config.get("share_att_key"):
        # Its query projection also maps relative positions, which all samples share: no scale for each sample.
        return ["value_proj"]
    if family not in TARGET_MODULES:
        raise InputError(
            f"no default projections for the model type {family!r}; name them in `target_modules`, e.g. "
            "['q_proj', 'v_proj'], or 'all-linear'"
        )
    return TARGET_MODULES[family]


class UnoLoraLinear(UnoLoraLayer, BaseTunerLayer):
    """`UnoLoraLayer` with PEFT's switches: active, disabled and merged adapters.

    PEFT's "all-linear" finds adapted projections again by the "Linear" in this name.
    """

    adapter_layer_names = ("uno_A", "uno_B")
    other_param_names = ("uno_dropout", "scaling", "position")
    base_layer: Any
    active_adapters: Any  # list[str], PEFT's property

    def __init__(self, base_layer: nn.Module, d_in: int, d_out: int) -> None:
        super().__init__(base_layer, d_in, d_out)
        self._disable_adapters = False
        self._active_adapter: list[str] | str = []
        self.merged_adapters: list[str] = []
        self.merged_scales: dict[str, Tensor] = {}  # what was merged, so that it can be taken out again

    def applied(self) -> list[str]:
        """Return the active adapters that this layer has, or none while disabled or merged."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.uno_A]

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; off means W as it was, so merged updates are taken out."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    def merged_weight(self, name: str) -> Tensor:
        """Return W with the adapter's update; a scale, where there is one, is taken from the running `condition`."""
        weight = self.base_layer.weight
        if is_packed(weight):
            stored = type(weight.data).__name__ if weight.is_floating_point() else weight.dtype
            raise InputError(f"W is stored as {stored}: load the backbone unquantised to merge into it")
        return weight.data + self.delta_weight(name).to(weight.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' update to W; `UnoLoraModel` has looked at `safe_merge` for all layers before."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name not in self.uno_A or name in self.merged_adapters:
                continue
            self.base_layer.weight.data = self.merged_weight(name)
            if name in self.position:
                self.merged_scales[name] = self.scale(name).detach().clone()  # [1, R]
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged updates out of W again."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            scales = {}
            if name in self.position:
                P = self.position[name]
                scales[name] = self.merged_scales.pop(name).unsqueeze(1).expand(1, P + 1, -1)  # only row P is read
            with torch.no_grad(), scaled_by(scales):
                self.base_layer.weight.data -= self.delta_weight(name).to(self.base_layer.weight.dtype)


class UnoLoraModel(BaseTuner):
    """The tuner that PEFT puts around a backbone.

    Beside what every PEFT tuner has: `uno_hypernetwork`, one `Hypernetwork` for each conditioned adapter;
    `condition(...)`, to call parts of the backbone by hand; `merge_and_unload(tasks=...)`.
    """

    prefix = "uno_"
    tuner_layer_cls = UnoLoraLinear
    target_module_mapping = TARGET_MODULES
    uses_shared_state = True
    active_adapters: Any  # list[str], PEFT's property
    uno_hypernetwork: Any  # adapter name -> Hypernetwork

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        earlier = getattr(model, "forward", None)
        if isinstance(earlier, Conditioned):  # its loading failed, or a notebook's cell runs again
            warnings.warn(
                "the backbone was adapted before; those adapters are taken out of it (`add_adapter` and `load_adapter` "
                "put several into one model)",
                stacklevel=2,
            )
            earlier.tuner.unload()
        # PEFT would enter this adapter in the table of another method's that is there already, and confuse the two.
        others = model.__dict__.pop("peft_config", None)
        super().__init__(model, peft_config, adapter_name, **kwargs)
        if others is not None:
            model.__dict__["peft_config"] = others
        for name in ("forward", "generate"):
            if hasattr(model, name):
                setattr(model, name, Conditioned(self, getattr(model, name), generates=name == "generate"))

    # --- injection ---------------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: UnoLoraConfig, adapter_name: str) -> None:
        self.uno_hypernetwork = nn.ModuleDict()
        self.merged_tasks: dict[str, str] = {}
        self._enabled = True

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put adapter `adapter_name` into `model`, then make its hypernetwork, one position for each projection."""
        _check_adapter_name(adapter_name)
        config = self.peft_config[adapter_name]
        d_s = _sample_dim(model, config) if config.conditioning == "task+sample" else None
        described = None
        if config.conditioning == "text":
            described = Descriptions(len(config.tasks), words.width(model), config.embedding_dim)
        trained = [(parameter, parameter.requires_grad) for parameter in self.uno_hypernetwork.parameters()]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for parameter, requires_grad in trained:  # PEFT does as much for what is in the layers
            parameter.requires_grad = requires_grad
        self._checkpointing_modules: list[Any] = [
            module for module in model.modules() if hasattr(module, "gradient_checkpointing")
        ]
        if config.conditioning == "none":
            return
        layers = self.layers(adapter_name)
        for position, layer in enumerate(layers.values()):
            layer.position[adapter_name] = position
        hypernetwork = Hypernetwork(
            len(config.tasks),
            len(layers),
            config.r,
            sample_dim=d_s,
            embedding_dim=config.embedding_dim,
            bottleneck_dim=config.bottleneck_dim,
            scale_init=config.scale_init,
            gated=config.scale_gate,
            shared_map=config.shared_scale_map,
            num_positions=config.num_positions,
            task_embedding=described,
        )
        hypernetwork.register_buffer("rows", _rows(config.tasks, layers))
        weight = next(iter(layers.values())).base_layer.weight
        dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        if not any(p.is_meta for p in hypernetwork.parameters()):
            hypernetwork.to(weight.device, dtype)
        self.uno_hypernetwork[adapter_name] = hypernetwork
        hypernetwork.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)

    def _prepare_adapter_config(self, peft_config: UnoLoraConfig, model_config: dict[str, Any]) -> UnoLoraConfig:
        listed = peft_config.layers_to_transform is not None
        found = named_targets(peft_config.target_modules, model_config, listed=listed)
        as_peft = set(found) if isinstance(found, list) else found  # its own configs have sets too
        peft_config.target_modules = as_peft  # type: ignore[assignment]
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: UnoLoraConfig, model: nn.Module) -> None:
        """Refuse targets that can't be adapted, before anything is changed."""
        _maybe_include_all_linear_layers(peft_config, model)
        adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, UnoLoraLinear))
        for name, module in model.named_modules():
            inside = isinstance(module, UnoLoraLinear) or name.startswith(adapted)
            if name and not inside and self._check_target_module_exists(peft_config, name):
                _widths(module, name)

    def _create_and_replace(
        self,
        config: UnoLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer: Any = target
        if not isinstance(target, UnoLoraLinear):
            layer = UnoLoraLinear(target, *_widths(target, current_key))
        layer.add(adapter_name, r=config.r, alpha=config.alpha, use_rslora=config.use_rslora, dropout=config.dropout)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        if adapter_name not in self.active_adapters:
            layer.uno_A[adapter_name].requires_grad_(False)
            layer.uno_B[adapter_name].requires_grad_(False)
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's also hands on `weight`, which a classification head of several layers does not have.
        setattr(parent, child_name, new_module)

    def layers(self, adapter_name: str) -> dict[str, UnoLoraLinear]:
        """Return the adapted projections by their names in the backbone, in the order of their positions."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, UnoLoraLinear) and adapter_name in module.uno_A
        }

    def task_vectors(self, adapter_name: str | None = None) -> list[Tensor]:
        """Return what an adapter has of each task, to be given back to `set_tasks`; nothing without conditioning.

        Returns:
            Of each task its row of the task embedding [d_e], or the vectors of its descriptions [n, D].
        """
        name = adapter_name or self.active_adapters[0]
        if name not in self.uno_hypernetwork:
            return []
        embedding = self.uno_hypernetwork[name].task_embedding
        rows = embedding.rows() if isinstance(embedding, Descriptions) else list(embedding.weight.detach())
        return [row.clone() for row in rows]

    def set_tasks(
        self, tasks: Sequence[str], vectors: Sequence[Tensor] | Tensor, adapter_name: str | None = None
    ) -> None:
        """Give an adapter other tasks: add, remove or rename them. All else stays as it is.

        Args:
            tasks: Names of the tasks [K].
            vectors: Of each a row [d_e], or the vectors of its descriptions [n, D], as `task_vectors` gives them; not
                looked at where `conditioning` is "none".
            adapter_name: The adapter; the active one by default.

        Raises:
            InputError: A name comes twice, there is not one vector of the right width for each, or the adapter is
                merged.
        """
        name = adapter_name or self.active_adapters[0]
        config, names = self.peft_config[name], task_names(tasks)
        if name in self.uno_hypernetwork:
            if name in self.merged_tasks:
                raise InputError(f"adapter {name!r} is merged; call unmerge_adapter() before its tasks change")
            hypernetwork = self.uno_hypernetwork[name]
            hypernetwork.task_embedding = _embedding_of(hypernetwork.task_embedding, names, vectors)
            hypernetwork.rows = _rows(names, self.layers(name)).to(hypernetwork.rows.device)
        config.tasks = names

    def describe(
        self, descriptions: Mapping[str, Sequence[str]], tokenizer: Any, adapter_name: str | None = None
    ) -> None:
        """Give tasks their words, where `conditioning` is "text". A name that is new becomes a task.

        The backbone, without adapters, reads them once; what it makes of them is saved with the adapter. The first call
        is for all tasks. On a trained adapter, a task with a description has a scale without an example.

        Args:
            descriptions: Task -> what it asks, in one or more wordings. Training draws one of them for each row;
                otherwise the first one counts.
            tokenizer: The backbone's.
            adapter_name: The adapter; the active one by default.

        Raises:
            InputError: The adapter takes no words, a task has none, or the adapter is merged.
        """
        name = adapter_name or self.active_adapters[0]
        known = self.peft_config[name].tasks
        for task, texts in descriptions.items():
            if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
                raise InputError(f"task {task!r}: expected a list of one description or more, got {texts!r}")
        embedding = self._descriptions(name)
        settled = len(embedding.vectors) > 0
        if lacking := [task for task in known if not settled and task not in descriptions]:
            raise InputError(f"task {lacking[0]!r} has no description yet; the first call is for all tasks")
        states = {task: self._states(texts, tokenizer) for task, texts in descriptions.items()}
        if not settled:
            embedding.settle(torch.cat(list(states.values())).to(embedding.middle))
        vectors = dict(zip(known, self.task_vectors(name), strict=True))
        vectors |= {task: embedding.standardised(found.to(embedding.middle)) for task, found in states.items()}
        self.set_tasks(list(vectors), list(vectors.values()), name)

    def described(self, texts: Sequence[str], tokenizer: Any, adapter_name: str | None = None) -> Tensor:
        """Return the vectors [n, D] of descriptions, as `set_tasks` takes them, of an adapter that has its words."""
        embedding = self._descriptions(adapter_name or self.active_adapters[0])
        return embedding.standardised(self._states(texts, tokenizer).to(embedding.middle))

    def _descriptions(self, name: str) -> Descriptions:
        found = self.uno_hypernetwork[name].task_embedding if name in self.uno_hypernetwork else None
        if not isinstance(found, Descriptions):
            raise InputError(
                f"adapter {name!r} has conditioning {self.peft_config[name].conditioning!r}, which takes no words; "
                "'text' does"
            )
        return found

    def _states(self, texts: Sequence[str], tokenizer: Any) -> Tensor:
        """Encode texts by the bare backbone, [n, D]."""
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        if any(layer.merged for layer in layers):
            raise InputError("an adapter is merged, so the backbone is not what it was; call unmerge_adapter() first")
        modes = {module: module.training for module in self.model.modules()}
        disabled, enabled = [layer._disable_adapters for layer in layers], self._enabled
        try:
            self._enabled = False
            for layer in layers:
                layer._disable_adapters = True
            self.model.eval()
            return words.encode(self.model, tokenizer, texts)
        finally:
            self._enabled = enabled
            for layer, before in zip(layers, disabled, strict=True):
                layer._disable_adapters = before
            for module, mode in modes.items():
                module.training = mode

    # --- conditioning ------------------------------------------------------------------------------------------

    @contextmanager
    def condition(
        self, tasks: Tasks | None = None, *, sample_mask: Tensor | None = None, **inputs: Any
    ) -> Iterator[None]:
        """Set the scales for everything that runs inside; forwards and `generate` without `tasks` then use them.

        `model(..., tasks=...)` does this by itself. It is for parts of the backbone called by hand (an encoder whose
        output several decodings share) and for decoding loops that feed one token at a time.

        Args:
            tasks: The task of each sample, see `Tasks`.
            sample_mask: Tokens [B, T] that the sample encoding averages. By default those of `attention_mask`; for a
                causal language model with `labels`, those among them that are not targets, since a scale that has
                seen the answer would be of no use without it.
            **inputs: What the backbone's forward takes; `input_ids`, `inputs_embeds` or `pixel_values`,
                `attention_mask` and `labels` are looked at.

        Raises:
            InputError: Tasks are missing, unknown or not one for each sample, or the sample encoding has nothing to
                average.
        """
        with self.conditioned(tasks, sample_mask, inputs):
            yield

    def conditioned(self, tasks: Tasks | None, sample_mask: Tensor | None, inputs: dict[str, Any]) -> Any:
        """Return the context of `condition`, of inputs in a dictionary, whose names may be any."""
        adapters = [name for name in self.active_adapters if name in self.uno_hypernetwork]
        if not self._enabled or not adapters:
            return nullcontext()
        if self.merged_tasks:
            self._check_merged(tasks)
            return nullcontext()
        if tasks is None:
            running = current_scales(self)
            if running is not None and all(name in running for name in adapters):
                return nullcontext()
            known = self.peft_config[adapters[0]].tasks
            raise InputError(
                f"`tasks` is missing: pass the task of each sample as names or rows, e.g. tasks=[{known[0]!r}, ...] "
                f"(known: {', '.join(known)}); note that PEFT drops an argument called `task_ids`"
            )
        hypernetworks = {name: self.uno_hypernetwork[name] for name in adapters}
        scales = scales_of(self.model, hypernetworks, self.peft_config, tasks, sample_mask, inputs)
        wrap_checkpointing(self._checkpointing_modules)
        return scaled_by(scales, self)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:  # PEFT would drop it silently
            raise InputError("`adapter_names` can't differ within a batch; what differs are `tasks`, of one adapter")
        yield

    # --- PEFT's switches, which know the layers but not the hypernetwork -----------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; others are frozen. A merged model is unmerged first."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self.merged_tasks.clear()
        for name, hypernetwork in self.uno_hypernetwork.items():
            hypernetwork.requires_grad_(name in self.active_adapters and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch the gradients of these adapters on or off."""
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.uno_hypernetwork:
                self.uno_hypernetwork[name].requires_grad_(requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._enabled = enabled
        if not enabled:
            self.merged_tasks.clear()  # the layers have taken them out
        for name, hypernetwork in self.uno_hypernetwork.items():
            hypernetwork.requires_grad_(enabled and name in self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter with its hypernetwork; the active one becomes another that remains."""
        active = list(self.active_adapters)
        super().delete_adapter(adapter_name)
        if adapter_name in self.uno_hypernetwork:
            del self.uno_hypernetwork[adapter_name]
        if adapter_name in active and self.peft_config:
            # PEFT lets each layer choose, and the layers may hold different adapters.
            active.remove(adapter_name)
            self.set_adapter(active or [min(self.peft_config)])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str) -> None:
        # PEFT calls this on every module that has it, after loading weights into empty (meta) ones.
        if adapter_name in self.uno_hypernetwork:
            layer = next(iter(self.layers(adapter_name).values()))
            self.uno_hypernetwork[adapter_name].to(layer.base_layer.weight.device)

    # --- merging -------------------------------------------------------------------------------------------------

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        tasks: Tasks | None = None,
    ) -> nn.Module:
        """Merge the update of one task into the backbone and return it, free of adapters.

        Args:
            progressbar: Show progress.
            safe_merge: Refuse weights that are not finite.
            adapter_names: The adapters to merge; the active ones by default.
            tasks: The task whose scale is merged; needed when `conditioning` is "task".

        Raises:
            InputError: The scale depends on the sample, or no (single, known) task is given where one is needed.
        """
        with self._merging(adapter_names, tasks, safe_merge):
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        *,
        tasks: Tasks | None = None,
    ) -> None:
        """Merge the update of one task into the backbone's weights until `unmerge_adapter`; see `merge_and_unload`."""
        with self._merging(adapter_names, tasks, safe_merge) as merged:
            super().merge_adapter(adapter_names, safe_merge)
            self.merged_tasks.update(merged)

    def unmerge_adapter(self) -> None:
        """Take the merged updates out of the backbone's weights again."""
        super().unmerge_adapter()
        self.merged_tasks.clear()

    @contextmanager
    def _merging(
        self, adapter_names: list[str] | None, tasks: Tasks | None, safe_merge: bool
    ) -> Iterator[dict[str, str]]:
        """Set the scales to merge; whatever forbids it is found before the first weight changes."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if isinstance(names, str):
            raise InputError(f"`adapter_names` must be a list of names, got {names!r}")
        scales, merged = {}, {}
        for name in names:
            if name not in self.peft_config:
                raise unknown("adapter", name, self.peft_config)
            if name not in self.uno_hypernetwork:
                continue
            merged[name] = task = self._task_to_merge(name, tasks)
            hypernetwork, known = self.uno_hypernetwork[name], self.peft_config[name].tasks
            with torch.no_grad():
                rows = task_rows([task], known, 1).to(hypernetwork.scale_weight.device)
                scales[name] = hypernetwork(rows)  # [1, P, R]
        with torch.no_grad(), scaled_by(scales, self):
            for name in names:
                for key, layer in self.layers(name).items():
                    if safe_merge and not layer.merged_weight(name).isfinite().all():
                        raise InputError(f"merging adapter {name!r} into {key!r} gives values that are not finite")
            yield merged

    def _task_to_merge(self, name: str, tasks: Tasks | None) -> str:
        known = self.peft_config[name].tasks
        if self.uno_hypernetwork[name].bottleneck is not None:
            raise InputError(
                f"adapter {name!r} scales its ranks for each sample (conditioning='task+sample'), so no single "
                "weight can stand for it; train with conditioning='task' to merge"
            )
        rows = task_rows([] if tasks is None else [tasks] if isinstance(tasks, str) else tasks, known, None)
        if len(rows) != 1:
            raise InputError(f"name the one task to merge, e.g. tasks={known[0]!r} (known: {', '.join(known)})")
        task: str = known[int(rows)]
        if self.merged_tasks.get(name, task) != task:
            raise InputError(
                f"adapter {name!r} is merged for task {self.merged_tasks[name]!r} already; call unmerge_adapter() first"
            )
        return task

    def _check_merged(self, tasks: Tasks | None) -> None:
        for name, task in self.merged_tasks.items():
            known = self.peft_config[name].tasks
            if tasks is not None and any(row != known.index(task) for row in task_rows(tasks, known, None).tolist()):
                raise InputError(f"adapter {name!r} is merged for task {task!r} only; call unmerge_adapter() first")

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if not merge:
            self.unmerge_adapter()
        model: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for name in ("forward", "generate"):
            if isinstance(model.__dict__.get(name), Conditioned):
                setattr(model, name, model.__dict__[name].method)
                if getattr(model.__dict__[name], "__self__", None) is model:
                    delattr(model, name)  # it was the class's own method
        for module in self._checkpointing_modules:
            if isinstance(getattr(module, "_gradient_checkpointing_func", None), Checkpointed):
                module._gradient_checkpointing_func = module._gradient_checkpointing_func.function
        return model

    # --- checkpoints ---------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: UnoLoraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT has dropped from `state_dict` all that has another adapter's name in its path, where a projection may be
        # called the same.
        own = adapter_state(model.base_model, adapter_name)
        return {key: state_dict.get(key, value) for key, value in own.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT strips the name only next to the end of a key, where a hypernetwork's parameters don't have it, and
        # also from a projection that is called the same.
        return re.sub(rf"\.(uno_\w+)\.{re.escape(adapter_name)}(?=\.|$)", r".\1", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: UnoLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        vectors = f"base_model.uno_hypernetwork.{adapter_name}.task_embedding."
        if f"{vectors}vectors" in remapped and config.conditioning == "text":  # how many descriptions there are
            embedding = model.base_model.uno_hypernetwork[adapter_name].task_embedding
            for part in ("vectors", "basis"):
                shape = len(remapped[f"{vectors}{part}"]), embedding.middle.shape[0]
                setattr(embedding, part, embedding.middle.new_zeros(shape))
        check_state(model.base_model, adapter_name, remapped, source=getattr(state_dict, "source", "the checkpoint"))
        return dict(remapped)


def register() -> None:
    """Enter UnoLoRA in PEFT's tables, under the name "UNOLORA"; `import unolora` does this."""
    peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = UnoLoraConfig
    peft_mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = UnoLoraModel
    peft_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = UnoLoraModel.prefix
    if not hasattr(peft_model.load_peft_weights, "__wrapped__"):
        peft_model.load_peft_weights = naming_the_file(peft_model.load_peft_weights)


def _embedding_of(old: nn.Module, tasks: Sequence[str], vectors: Sequence[Tensor] | Tensor) -> nn.Module:
    """Return the task embedding with these vectors, one a task."""
    if isinstance(old, Descriptions):
        width = old.middle.shape[0]
        if not tasks or len(vectors) != len(tasks) or not all(v.shape == (len(v), width) and len(v) for v in vectors):
            found = [list(vector.shape) for vector in vectors]
            raise InputError(f"{len(tasks)} tasks need vectors [n, {width}] of each, got {found}")
        old.put(list(vectors))
        return old
    assert isinstance(old, nn.Embedding)
    rows = [len(vectors), *(vectors[0].shape if len(vectors) else [])]
    if not tasks or rows != [len(tasks), old.weight.shape[1]]:
        raise InputError(
            f"{len(tasks)} tasks need an embedding [{len(tasks)}, {old.weight.shape[1]}] with at least one row, got "
            f"{rows}"
        )
    new = nn.Embedding(rows[0], rows[1], device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(torch.stack(list(vectors)))
    return new.requires_grad_(old.weight.requires_grad)


def _rows(tasks: Sequence[str], layers: Mapping[str, nn.Module]) -> Tensor:
    """Spell tasks and positions as bytes: the same numbers under other names would be another adapter."""
    text = json.dumps({"tasks": list(tasks), "positions": list(layers)})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _check_adapter_name(name: str) -> None:
    """Refuse names that torch's dictionaries of modules and parameters can't hold."""
    if not name or "." in name or any(hasattr(kind(), name) for kind in (nn.ModuleDict, nn.ParameterDict)):
        raise InputError(f"an adapter can't be called {name!r}, which torch's nn.ModuleDict does not take as a key")


def _widths(target: nn.Module, key: str) -> tuple[int, int]:
    """Return (d_in, d_out) of a projection."""
    if isinstance(target, NonDynamicallyQuantizableLinear):
        raise InputError(
            f"`target_modules` matches {key!r}, whose weight nn.MultiheadAttention reads without calling it, so that "
            "an adapter would do nothing; leave it to `exclude_modules`"
        )
    if isinstance(target, BaseTunerLayer):
        raise InputError(
            f"`target_modules` matches {key!r}, which has an adapter of another method already; two methods share a "
            "backbone, not a projection: name others, or leave this one to `exclude_modules`"
        )
    if isinstance(target, nn.Linear):
        return target.in_features, target.out_features
    if isinstance(target, Conv1D):
        d_in, d_out = target.weight.shape
        return d_in, d_out
    raise InputError(
        f"`target_modules` matches {key!r}, a {type(target).__name__}; only nn.Linear and transformers' Conv1D can be "
        "adapted: name the projections, or leave this one to `exclude_modules`"
    )


def _sample_dim(model: nn.Module, config: UnoLoraConfig) -> int:
    """Find the width of the backbone's input embeddings, and check a given `sample_dim` against it."""
    width, embeddings = config.sample_dim, input_embeddings(model)
    if embeddings is not None:
        hidden_size = getattr(getattr(model, "config", None), "hidden_size", None)
        found = getattr(embeddings, "embedding_dim", None) or hidden_size
        if width is not None and found is not None and width != found:
            raise InputError(f"`sample_dim` is {width}, but the backbone's embeddings are {found} wide; leave it out")
        width = width or found
    if width is None:
        raise InputError(
            "the backbone does not say how wide its input embeddings are; give `sample_dim`, the width of its input, "
            "or use conditioning='task'"
        )
    return int(width)
