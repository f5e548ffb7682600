"""The transformers Trainer as every method is trained by it: its steps, its log and its checkpoints.

All that a step depends on is a function of (seed, step): its batch, its dropout and its learning rate. So a checkpoint
holds weights and optimiser moments, nothing is replayed when a run goes on, and it ends as if it had never stopped.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from unolora import gradients, metrics, processes, rates, recovery, runs, scoring
from unolora.atomic import explained, write_json
from unolora.data import Collator, Encoded, TaskRows, TrainingBatches
from unolora.errors import InputError
from unolora.recovery import Checkpoints
from unolora.sampling import Sampler
from unolora.settings import Settings
from unolora.tasks import Task

logger = logging.getLogger(__name__)

Splits = Mapping[str, Mapping[int, Encoded]]
"""Split -> task row -> its tokens."""


class MultiTaskTrainer(Trainer):
    """The Trainer on stateless batches, scored per task, with checkpoints free of pickle.

    Args:
        model: Adapted encoder and heads.
        settings: The run.
        tasks: In the order of their rows.
        splits: For "train" and "validation" each task row's tokens.
        collate: Pads a batch.
        checkpoints: Those of the run, whose folder also gets the log.
    """

    control: Any  # what the Trainer does after a step

    def __init__(
        self,
        model: runs.Model,
        settings: Settings,
        tasks: Sequence[Task],
        splits: Splits,
        collate: Collator,
        checkpoints: Checkpoints,
    ) -> None:
        t = settings.training
        args = TrainingArguments(
            output_dir=str(checkpoints.run),
            use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused on a processor
            max_steps=t.steps,
            per_device_train_batch_size=max(1, t.batch_size // t.gradient_accumulation // processes.count()),
            gradient_accumulation_steps=t.gradient_accumulation,
            learning_rate=t.learning_rate,
            weight_decay=t.weight_decay,
            warmup_steps=t.warmup_steps,
            lr_scheduler_type={"constant": "constant_with_warmup"}.get(t.schedule, t.schedule),
            max_grad_norm=t.max_grad_norm,
            seed=t.seed,
            bf16=t.precision == "bf16",
            eval_strategy="steps",
            eval_steps=t.evaluate_every,
            save_strategy="steps",
            save_steps=t.checkpoint_every or t.evaluate_every,
            logging_steps=t.log_every,
            metric_for_best_model="average",
            greater_is_better=True,
            ignore_data_skip=True,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to=t.report_to or "none",
            logging_nan_inf_filter=False,  # it waits for the device at each micro-batch; such steps are skipped here
            ddp_find_unused_parameters=not model.method.mixes,  # a rank's rows may lack a task, and so its parameters
        )
        model._no_split_modules = processes.layers(model)  # type: ignore[assignment]  # where Accelerate looks for it
        trained, validated = (TaskRows(list(splits[name].values())) for name in ("train", "validation"))
        super().__init__(model, args, data_collator=collate, train_dataset=trained, eval_dataset=validated)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.settings, self.tasks, self.splits = settings, list(tasks), splits
        self.checkpoints, self.folder = checkpoints, checkpoints.run
        self.sampler = Sampler(
            [len(split) for split in splits["train"].values()],
            batch_size=t.batch_size,
            seed=t.seed,
            strategy=settings.sampling.strategy,
            temperature=settings.sampling.temperature,
            limit=settings.sampling.limit,
            mixed=settings.sampling.mixed,
        )
        self.model_accepts_loss_kwargs = False
        self.stopped = False
        self.train_seconds = self.evaluation_seconds = 0.0  # of the parts of this run that are over
        self._started: float | None = None
        self._micro = 0
        # Of each task in the current step, on the device: the sum of the finite losses, their rows, and the other rows
        self._step = torch.zeros(3, len(tasks), dtype=_exact(args.device), device=args.device)
        self._since_log = torch.zeros_like(self._step[:2])  # the first two since the last line, of this rank
        self.skips = Skips()
        self._pulls: dict[int, Tensor] = {}  # the running step's gradient of each task, where it is to be logged

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW, with learning rates apart where the settings say so."""
        new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if new:
            t = self.settings.training
            rates.part(optimizer, self.model if model is None else model, t.b_rate_ratio, t.hypernetwork_rate_ratio)
        return optimizer

    # --- a step is a function of (seed, step) ----------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's micro-batches from the current step on; they are sharded here, not by Accelerate."""
        batches = TrainingBatches(
            self.sampler,
            [split.lengths() for split in self.splits["train"].values()],
            self.args.max_steps,
            lambda: self.state.global_step,
            accumulation=self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Take one forward and backward, with dropout keyed by (seed, step, micro-batch, rank)."""
        self._micro = (self._micro + 1) % self.args.gradient_accumulation_steps
        key = [self.args.seed, self.state.global_step, self._micro, self.args.process_index]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return the mean loss of the batch, and keep each task's share of it on the device."""
        out = model(**inputs)
        losses = out["losses"].detach().to(self._step.dtype)
        own = inputs["tasks"] == torch.arange(len(self.tasks), device=losses.device).unsqueeze(1)  # [K, B]
        finite = own & losses.isfinite()
        self._step[0] += torch.where(finite, losses, 0).sum(1)
        self._step[1] += finite.sum(1)
        self._step[2] += (own & ~finite).sum(1)
        if self._conflict_is_due():
            parameters = gradients.shared(self.model)
            for row, gradient in gradients.of_tasks(out["losses"], inputs["tasks"], parameters).items():
                self._pulls[row] = self._pulls.get(row, 0) + gradient
        return out["loss"]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradients, and skip the step if a loss or a gradient of any rank is not finite.

        Without gradients the optimiser leaves weights and moments as they are. Looking at the norm is the one time in
        a step that the host waits for the device.
        """
        norm = super()._clip_grad_norm(model)
        odd = torch.cat([self._step[2] > 0, ~processes.whole(norm.detach()).isfinite().reshape(1)]).float()
        *of_tasks, of_norm = processes.largest(odd).tolist()
        if of_norm or any(of_tasks):
            for parameter in model.parameters():
                parameter.grad = None
            self._skip([task.name for task, bad in zip(self.tasks, of_tasks, strict=True) if bad])
        else:
            self._since_log += self._step[:2]
            self.skips.in_a_row = 0
        self._step.zero_()
        return norm

    def _skip(self, tasks: list[str]) -> None:
        """Count a step that is not taken, and stop after too many in a row.

        Raises:
            InputError: It was one too many.
        """
        self.skips.count(tasks)
        step, most = self.state.global_step + 1, self.settings.training.max_skipped
        what = f"the loss of task {tasks[0]!r}" if tasks else "a gradient"
        logger.warning("step %d is skipped: %s is not finite", step, what)
        if self.skips.in_a_row < most:
            self._write_line(kind="skipped", step=step, tasks=tasks)
            return
        path = self.folder / "not-finite.json"
        processes.first(lambda: write_json(path, self._rows_of_step(step - 1)))
        raise InputError(
            f"{what} is not finite at step {step}, the {most}. in a row: training diverged; try a lower "
            f"`training.learning_rate` (the rows of the step are in {path})"
        )

    def _rows_of_step(self, step: int) -> list[dict[str, Any]]:
        """Describe the global batch of a step, for a person to look at."""
        decode = self.data_collator.tokenizer.decode
        found = []
        for task, row in self.sampler.batch(step):
            _, split, place = self.train_dataset[task, row]
            tokens = split.inputs["input_ids"][place]
            found.append(
                {
                    "task": self.tasks[task].name,
                    "row": row,
                    "target": float(split.targets[place]),
                    "tokens": list(tokens),
                    "text": decode(tokens),
                }
            )
        return found

    def _conflict_is_due(self) -> bool:
        every = self.settings.training.conflict_every
        return every is not None and (self.state.global_step + 1) % every == 0 and self.model.training

    def log_conflict(self) -> None:
        """Write the cosines between the gradients of the step's tasks, if they were due, as a line of metrics.jsonl."""
        if not self._pulls:
            return
        names = [self.tasks[row].name for row in sorted(self._pulls)]
        cosines = gradients.cosines([self._pulls[row] for row in sorted(self._pulls)])
        self._pulls = {}
        table = {
            name: {other: round(value, 4) for other, value in zip(names, row, strict=True) if other != name}
            for name, row in zip(names, cosines, strict=True)
        }
        self._write_line(kind="conflict", step=self.state.global_step, cosines=table)

    # --- what is measured --------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and write a line of metrics.jsonl for the training loss."""
        if "loss" not in logs:
            super().log(logs, *args, **kwargs)
            return
        loss, seen = np.array(processes.summed(self._since_log).tolist())
        self._since_log.zero_()
        if not seen.any():  # all steps since the last line were skipped
            return
        logs["loss"] = float(loss.sum() / seen.sum())  # the Trainer's own counts skipped steps
        super().log(logs, *args, **kwargs)
        self._write_line(
            kind="train",
            step=self.state.global_step,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            seconds=round(self.seconds(), 3),
            examples=self.state.global_step * self.settings.training.batch_size,
            seen=self.seen(),
            task_loss={t.name: float(a / n) for t, a, n in zip(self.tasks, loss, seen, strict=True) if n},
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the validation splits; the average decides which weights are kept."""
        started = time.perf_counter()
        how = self.settings.scoring
        found = scoring.evaluate(self.model, self.tasks, self.splits["validation"], self.data_collator, how)
        spent = time.perf_counter() - started
        self.evaluation_seconds += spent
        self.train_seconds -= spent
        scores = {name: next(iter(values.values())) for name, values in found.items()}
        average = metrics.average(found)
        if self.state.best_metric is None or average > self.state.best_metric:
            weights, step = self._weights(), self.state.global_step
            processes.first(lambda: self.checkpoints.write_best(step, weights, found))
        self._write_line(
            kind="evaluation",
            step=self.state.global_step,
            split="validation",
            average=average,
            scores=scores,
            metrics=found,
        )
        logs = {"eval_average": average, **{f"eval_{name}": score for name, score in scores.items()}}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def try_average(self) -> None:
        """Score the mean of the last checkpoints' weights, if asked for; it is kept if it is better than the best."""
        many, before = self.settings.training.average_last, self.state.best_metric
        if many == 1:
            return
        paths = recovery.found(self.folder)[-many:]
        states = [runs.load_tensors(path / "weights.safetensors") for path in paths]
        mean = {
            name: torch.stack([state[name] for state in states]).mean(0) if value.is_floating_point() else value
            for name, value in states[-1].items()
        }
        runs.load_state(self.model, mean, paths[-1])
        average = self.evaluate()["eval_average"]
        if before is None or average > before:
            self.state.best_metric, self.state.best_global_step = average, self.state.global_step

    def seen(self) -> dict[str, int]:
        """Return how many rows of each task the steps so far have used."""
        counts = self.sampler.counts(self.state.global_step)
        return {task.name: int(n) for task, n in zip(self.tasks, counts, strict=True)}

    def seconds(self) -> float:
        """Return the time spent in training so far without evaluations, over all parts of a run, in seconds."""
        return self.train_seconds + (0.0 if self._started is None else time.perf_counter() - self._started)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint if one is given."""
        self._started = time.perf_counter()
        out = super().train(*args, **kwargs)
        self.train_seconds, self._started = self.seconds(), None
        return out

    def _write_line(self, **values: Any) -> None:
        if self.args.should_save:
            path = self.folder / "metrics.jsonl"
            with explained(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values, allow_nan=False) + "\n")

    # --- checkpoints: safetensors and JSON ---------------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        return {name: processes.whole(value) for name, value in runs.state(self.model).items()}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        weights = self._weights()
        moments = {
            f"{i}.{name}": processes.whole(value)
            for i, values in self.optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        state = {
            "since_log": processes.summed(self._since_log).tolist(),
            "skips": vars(self.skips),
            "train_seconds": self.seconds(),
            "evaluation_seconds": self.evaluation_seconds,
        }
        step, save = self.state.global_step, self.state.save_to_json
        processes.first(lambda: self.checkpoints.write(step, weights, moments, state, save))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        kept = recovery.read_json(folder / "state.json", "since_log", "skips", "train_seconds", "evaluation_seconds")
        runs.load_state(self.model, runs.load_tensors(folder / "weights.safetensors"), folder)
        if processes.rank() == 0:  # it is a sum over ranks
            self._since_log = torch.tensor(kept["since_log"], dtype=self._step.dtype, device=self._step.device)
        self.skips = Skips(**kept["skips"])
        self.train_seconds, self.evaluation_seconds = kept["train_seconds"], kept["evaluation_seconds"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        found = self.optimizer.state_dict()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        found["state"] = {}
        for name, value in runs.load_tensors(Path(checkpoint) / "optimizer.safetensors").items():
            i, _, key = name.partition(".")
            cut = processes.spread(value, parameters[int(i)]) if value.dim() else value  # a number is a step count
            found["state"].setdefault(int(i), {})[key] = cut
        self.optimizer.load_state_dict(found)
        schedule, step = self.lr_scheduler, self.state.global_step
        schedule.last_epoch, schedule._step_count = step - 1, step + 1  # (the count is for a warning only)
        schedule.step()  # the learning rate is a function of the step

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass  # there is none: `training_step` seeds each step


class Steps(TrainerCallback):
    """Evaluates after the last step, and ends training after the running one when a signal came."""

    def __init__(self, trainer: MultiTaskTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the switches for what follows this step."""
        self.trainer.log_conflict()
        asked = torch.tensor(float(self.trainer.stopped), device=args.device)
        self.trainer.stopped = bool(processes.largest(asked))  # a signal may reach the ranks at different steps
        if state.global_step == state.max_steps:
            control.should_evaluate = control.should_log = True
            self.trainer.stopped = False  # a signal now comes too late to stop anything
        elif self.trainer.stopped:
            control.should_save = control.should_training_stop = True


@dataclass
class Skips:
    """The steps that were not taken, since something in them was not finite."""

    steps: int = 0
    in_a_row: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    """Of each task whose loss was not finite, in how many of them; in the others only the gradient was not."""

    def count(self, tasks: Sequence[str]) -> None:
        """Count one more."""
        self.steps, self.in_a_row = self.steps + 1, self.in_a_row + 1
        for task in tasks:
            self.tasks[task] = self.tasks.get(task, 0) + 1


def _exact(device: torch.device) -> torch.dtype:
    """The widest numbers that a device adds up."""
    return torch.float32 if device.type == "mps" else torch.float64
