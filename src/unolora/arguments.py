"""What a command is given: the YAML file and flags of `unolora train`, the flags of the others, lines of text."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from unolora import settings as run_settings
from unolora.errors import InputError, did_you_mean
from unolora_cli import COMMANDS


def train_settings(arguments: list[str]) -> tuple[run_settings.Settings, Path | None, bool]:
    """Read the YAML file and the flags of `unolora train`: (settings, the file's folder, whether to resume).

    Raises:
        InputError: A file or a flag can't be used.
    """
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings

    from unolora import runs

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="unolora train",
        usage="unolora train CONFIG.yaml [--section.name VALUE ...] | unolora train --resume RUN",
        description=f"{COMMANDS['train']}. Flags win over the file.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="the YAML file; CONFIG.yaml alone does the same")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its own settings")
    parser.add_argument(
        "--preset", metavar="NAME", help=f"start from these settings: {', '.join(run_settings.PRESETS)}"
    )
    parser.add_class_arguments(run_settings.Settings)
    if arguments and not arguments[0].startswith("-"):
        arguments[:1] = ["--config", arguments[0]]
    root, name, start = None, "run", _flags(arguments, "--preset")
    for path in _config_files(arguments):
        given = runs.read_yaml(path)
        run_settings.check_keys(given)  # with near misses, which the parser does not have
        start = start or ([given["preset"]] if "preset" in given else [])
        root, name = path.parent, path.resolve().parent.name if path.stem == "config" else path.stem
    if start:  # as defaults, so that the file and the flags win
        below = run_settings.preset(start[-1])
        parser.set_defaults({f"{k}.{n}": v for k in run_settings.SECTIONS for n, v in below.get(k, {}).items()})
        parser.set_defaults({k: v for k, v in below.items() if k not in run_settings.SECTIONS})
    try:
        found = parser.parse_args(arguments).as_dict()
    except (ArgumentError, TypeError) as error:
        raise InputError(_one_line(error, [action.dest for action in parser._actions])) from error
    resume = found.pop("resume")
    if resume is not None:
        if len(arguments) > 2 or not arguments[0].startswith("--resume"):
            raise InputError("--resume takes the run folder and nothing else: a run goes on with its own settings")
        settings = runs.read_settings(Path(resume))
        settings.output = resume
        return settings, None, True
    found.pop("config")
    found.pop("preset")
    settings = run_settings.from_dict(found)
    settings.output = settings.output or str(Path("runs", name))
    return settings, root, False


def _config_files(arguments: Sequence[str]) -> list[Path]:
    return [Path(name) for name in _flags(arguments, "--config")]


def _flags(arguments: Sequence[str], name: str) -> list[str]:
    """Return the values that a flag has in the arguments."""
    after = [value for flag, value in itertools.pairwise(arguments) if flag == name]
    joined = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{name}=")]
    return after + joined


def _one_line(error: Exception, known: Sequence[str]) -> str:
    text = " ".join(str(error).split())
    words = [word.lstrip("-").partition("=")[0].rstrip(":") for word in text.split() if word.startswith("--")]
    return text + (did_you_mean(words[0], known) if words and words[0] not in known else "")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others here."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"unolora {command}", description=COMMANDS[command], allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong as an InputError."""
        known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        raise InputError(f"{_one_line(ValueError(message), known)}; see `{self.prog} --help`")


def run_parser(command: str) -> Parser:
    """Return the parser of a command whose first argument is a run folder."""
    parser = Parser(command)
    parser.add_argument("run", type=Path, help="run folder")
    return parser


def read_lines(path: Path | None) -> list[str]:
    """Read the lines of a text file, or of standard input without one.

    Raises:
        InputError: It can't be read, or is not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if path is None else path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path or 'standard input'}: not UTF-8 at byte {error.start}") from error
    # Not splitlines(), which also cuts at U+2028 and others; empty lines count, so that answers stay beside inputs.
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
