"""The `unolora` program: what answers `--help` before anything heavy is imported.

It is a module beside the package, since importing the package means importing PEFT and torch.
"""

from __future__ import annotations

import difflib
import keyword
import logging
import os
import sys

COMMANDS = {
    "train": "train a method on tasks, from a YAML file and flags; writes a run folder",
    "evaluate": "score a run on its test (or validation) splits",
    "predict": "predict texts with one task of a run; JSON lines out",
    "serve": "serve all tasks of a run over HTTP, with a page to try them",
    "tasks": "list the built-in tasks, or a run's",
    "add-task": "teach a run one more task; the others stay bit for bit as they are",
    "remove-task": "copy a run without one of its tasks",
    "rename-task": "copy a run with another name for one of its tasks",
    "import": "make one adapter to start from of several plain PEFT LoRAs, one a task",
    "export": "write tasks of a run as plain PEFT LoRAs, or merged into the backbone",
    "push": "upload a run to the Hugging Face Hub, with a model card",
    "report": "write a run's report.html again, or a page that compares several runs",
    "compare": "put finished runs side by side, averaged over their seeds",
    "analyze": "say whether runs learned the same: subspaces of A and of B, ranks, scales",
    "bench": "measure this machine's speed and memory ratios; writes benchmarks.md; `bench serve` measures serving",
    "doctor": "say what is installed, what the machine can do, and what is missing",
}
"""Command -> what it does; `unolora.cli` has a function of each name, with _ for - (and `import_`)."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for input that can't be used, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if command == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"unolora {version('unolora')}\n")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        sys.stderr.write(f"error: unknown command {command!r}{hint} (known: {', '.join(COMMANDS)})\n")
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    _share_the_machine()
    from unolora import cli
    from unolora.errors import InputError

    try:
        name = command.replace("-", "_")
        return int(getattr(cli, f"{name}_" if keyword.iskeyword(name) else name)(arguments[1:]))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:  # the reader, `head` for example, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _share_the_machine() -> None:
    """Let the threads of an operation soon go to sleep when they wait for each other; GNU's OpenMP reads this once.

    Where other work holds a core, they would spin through the time slice in which the last of them could end.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # turns; as fast as any more on a quiet machine


def _help() -> str:
    rows = "\n".join(f"  {name:<13}{summary}" for name, summary in COMMANDS.items())
    return (
        "usage: unolora COMMAND ...\n\nOne low-rank adapter for many tasks.\n\n"
        f"{rows}\n\n`unolora COMMAND --help` tells more; `unolora --version` prints the version.\n"
    )
