"""What a server is told: the flags of `unolora serve`. A value that makes no sense is refused here."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from unolora.errors import InputError


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ServeSettings:
    """The server's settings; each field is a flag of its name."""

    host: str = _flag("127.0.0.1", "address to listen on; others than loopback need keys, or --insecure")
    port: int = _flag(8000, "port to listen on; 0 takes a free one")
    workers: int = _flag(1, "processes, each with the model; they share the port")
    keys: str | None = _flag(None, "file with the hashes of API keys; without one anybody may ask")
    tls_cert: str | None = _flag(None, "certificate (PEM), for https")
    tls_key: str | None = _flag(None, "its private key (PEM)")
    cors: tuple[str, ...] = _flag(
        (), "origin whose pages may ask, such as https://example.org; may be given repeatedly"
    )
    insecure: bool = _flag(False, "listen elsewhere than on loopback without keys")
    max_batch: int = _flag(32, "rows of a batch")
    max_batch_tokens: int = _flag(8192, "tokens of a batch, with padding")
    max_wait_ms: float = _flag(2.0, "milliseconds that an idle model waits for a batch to fill")
    max_queue: int = _flag(1024, "rows that wait; more are answered 429")
    max_body: int = _flag(1_000_000, "bytes of a request's body")
    max_inputs: int = _flag(256, "inputs of a request")
    max_characters: int = _flag(20_000, "characters of a text")
    max_tokens: int = _flag(256, "tokens that a request may let the model write for each input")
    rate: float | None = _flag(None, "requests a second of one key (or address, without keys), twice as many at once")
    max_connections: int = _flag(1024, "open connections; more are answered 503")
    receive_timeout: float = _flag(10.0, "seconds in which a request must have arrived")
    timeout: float = _flag(60.0, "seconds in which a request must be answered")
    shutdown_timeout: float = _flag(60.0, "seconds that stopping waits for what was accepted")

    def __post_init__(self) -> None:
        for name in ("workers", "max_batch", "max_batch_tokens", "max_queue", "max_inputs", "max_tokens"):
            self._at_least(1, name)
        for name in ("max_body", "max_characters", "max_connections"):
            self._at_least(1, name)
        for name in ("rate", "receive_timeout", "timeout", "shutdown_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"`{name}` must be a number above 0, got {value!r}")
        self._at_least(0, "max_wait_ms")
        if not 0 <= self.port <= 65535:
            raise InputError(f"`port` must be between 0 and 65535, got {self.port}")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise InputError("`tls_cert` and `tls_key` belong together; give both, or none")
        for path in (self.keys, self.tls_cert, self.tls_key):
            if path is not None and not Path(path).is_file():
                raise InputError(f"{path}: no such file")
        if not (self.loopback or self.keys or self.insecure):
            raise InputError(
                f"{self.host} can be reached from other machines, and no keys are set: give `--keys FILE` "
                "(`unolora serve --keys FILE --new-key NAME` makes one), or `--insecure` if anybody may ask"
            )

    def _at_least(self, least: int, name: str) -> None:
        value = getattr(self, name)
        if not least <= value < math.inf:
            raise InputError(f"`{name}` must be at least {least}, got {value!r}")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """Add a flag for each field."""
        for each in dataclasses.fields(cls):
            name, text = f"--{each.name.replace('_', '-')}", each.metadata["help"]
            if isinstance(each.default, bool):
                parser.add_argument(name, action="store_true", help=text)
            elif isinstance(each.default, tuple):
                parser.add_argument(name, action="append", default=[], metavar="ORIGIN", help=text)
            else:
                kind = {"rate": float}.get(each.name, str if each.default is None else type(each.default))
                shown = "" if each.default is None else "; default: %(default)s"
                parser.add_argument(name, type=kind, default=each.default, help=text + shown)

    @classmethod
    def from_flags(cls, options: argparse.Namespace) -> Self:
        """Build the settings from what the parser found."""
        found = {each.name: getattr(options, each.name) for each in dataclasses.fields(cls)}
        return cls(**{**found, "cors": tuple(found["cors"])})
