"""What a person sees while a run trains: a bar with the loss, the rows seen of each task, and the time left."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from unolora.trainer import MultiTaskTrainer

logger = logging.getLogger(__name__)


class Bar(TrainerCallback):
    """Shows one method's training on a console; a console that is no terminal gets a line at each log instead.

    Args:
        label: The method's name.
        trainer: Whose rows are counted.
        console: Where to show it.
    """

    def __init__(self, label: str, trainer: MultiTaskTrainer, console: Console) -> None:
        self.trainer, self.label, self.console = trainer, label, console
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.bar = self.progress.add_task(label, total=trainer.args.max_steps, status="")
        self.loss = self.average = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.progress.update(self.bar, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Show the newest loss and validation average."""
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.3f}"
        if "eval_average" in logs:
            self.average = f"validation {logs['eval_average']:.3f}"
        seen = " ".join(f"{name} {n}" for name, n in self.trainer.seen().items())
        self.progress.update(self.bar, status=f"{self.loss}  {self.average}\n  [dim]rows {seen}[/]")
        if not self.console.is_terminal:
            step = f"step {state.global_step}/{args.max_steps}"
            self.console.print(f"{self.label}  {step}  {self.loss}  {self.average}  rows {seen}", soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar."""
        self.stop()

    def stop(self) -> None:
        """Give the terminal back, also after an error, which the Trainer does not tell its callbacks."""
        self.progress.stop()
