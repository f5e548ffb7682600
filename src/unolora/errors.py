"""The one error that users see, and "did you mean".

`InputError` is for what a user gave (a file, a name, a number) that cannot be used. Its message is one line that says
what was expected, what came, and what to do; the command line prints it and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice

LISTED = 100
"""How many known names an error lists: a table may have a million columns."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line and says what to do."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known name, or "" when none is near."""
    near = difflib.get_close_matches(str(name)[:100], [str(k)[:100] for k in islice(known, 1000)], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Build the error for a name that is not known, with the nearest known one and the list of all.

    Args:
        kind: What the name stands for, in the singular ("task", "column").
        name: The name that came.
        known: The names that would have been accepted.
    """
    known = [str(k) for k in known]
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    listed = ", ".join(known[:LISTED]) or "none"
    return InputError(f"unknown {kind} {name!r}{did_you_mean(name, known)} (known: {listed}{more})")


class CheckpointError(InputError):
    """A file on disk does not hold what it should; the message names the file, what was expected and what was found."""
