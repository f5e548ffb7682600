"""API keys, of which a file holds the hashes, one a line.

    NAME ROLE SHA256           where ROLE is `user` or `admin`

A key is 256 random bits, so that one round of SHA-256 is enough: there is nothing to guess. Every key of the file is
compared, in constant time, whether or not an earlier one was right.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from unolora.atomic import write_text
from unolora.errors import InputError

ROLES = ("user", "admin")


@dataclass(frozen=True)
class Caller:
    """Who a key belongs to."""

    name: str
    admin: bool


class Keys:
    """The keys that are accepted.

    Args:
        digests: SHA-256 of each key, as hexadecimal digits, and whose it is.
    """

    def __init__(self, digests: dict[str, Caller]) -> None:
        self._digests = digests

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of keys.

        Raises:
            InputError: It can't be read, a line is not `NAME ROLE SHA256`, or no key is in it.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: can't be read ({error})") from error
        found = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            match = re.fullmatch(r"\s*(\S+)\s+(user|admin)\s+([0-9a-f]{64})\s*", line)
            if match is None:
                raise InputError(f"{path}: line {number}: expected `NAME user|admin SHA256`; `--new-key` writes it")
            found[match[3]] = Caller(match[1], match[2] == "admin")
        if not found:
            raise InputError(f"{path}: no key in it; `unolora serve --keys {path} --new-key NAME` makes one")
        return cls(found)

    def find(self, key: str) -> Caller | None:
        """Return whose key it is, or None."""
        digest = _digest(key)
        found = None
        for known, caller in self._digests.items():
            if hmac.compare_digest(known, digest):
                found = caller
        return found


def new_key(path: Path, name: str, *, admin: bool = False) -> str:
    """Make a key, add its hash to the file (which is made if it isn't there), and return the key.

    Raises:
        InputError: The name is no word or is taken, or the file can't be read or written.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise InputError(f"a key's name is letters, digits, `.`, `_` and `-`, got {name!r}")
    lines = ""
    if path.exists():
        keys = Keys.read(path)
        if any(caller.name == name for caller in keys._digests.values()):
            raise InputError(f"{path}: a key called {name!r} is there; take another name, or delete its line")
        lines = path.read_text(encoding="utf-8")
        lines += "" if lines.endswith("\n") else "\n"
    key = f"uno-{secrets.token_urlsafe(32)}"
    write_text(path, f"{lines}{name} {ROLES[admin]} {_digest(key)}\n")
    return key


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
