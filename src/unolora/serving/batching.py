"""Which of the waiting rows run together: a pure function of their lengths, oldest first.

One forward of n rows pads them to the longest, and costs about

    overhead * steps + n * (longest + steps)            in units of a token's time

where steps is 1, or the tokens to be written. So a short row beside a long one is dear, and a forward of its own is
dear too. The window of the oldest rows is cut, in the order of length, where the sum over its forwards is least; the
forward that holds the oldest row runs next, and then all is decided anew with what has come meanwhile. Every forward
thus serves the row that has waited longest, and no row waits for ever for one of its own length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Size(NamedTuple):
    """How much work a row is."""

    length: int
    """Tokens to read."""
    steps: int = 1
    """Passes of the model: 1, or as many as tokens may be written."""


def choose(sizes: Sequence[Size], *, max_rows: int, max_tokens: int, overhead: float) -> list[int]:
    """Choose the rows of the next forward.

    Args:
        sizes: Of the waiting rows, the oldest first [N].
        max_rows: Most rows of a forward.
        max_tokens: Most tokens of a forward, padding and tokens to be written among them. A row that is longer runs
            alone.
        overhead: What a pass costs beside its tokens, in tokens.

    Returns:
        Places in `sizes`, in rising order, 0 among them.
    """
    window = range(min(len(sizes), 2 * max_rows))
    order = sorted(window, key=lambda place: (sizes[place].steps, sizes[place].length))
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first `end` rows: cost, where the last forward begins
    for end in range(1, len(order) + 1):
        found = (float("inf"), end - 1)
        steps, longest = sizes[order[end - 1]].steps, 0
        for begin in range(end - 1, max(-1, end - 1 - max_rows), -1):
            longest = max(longest, sizes[order[begin]].length)
            tokens = (end - begin) * (longest + steps)
            if tokens > max_tokens and end - begin > 1:
                break
            found = min(found, (best[begin][0] + overhead * steps + tokens, begin))
        best.append(found)
    end = len(order)
    while 0 not in order[best[end][1] : end]:
        end = best[end][1]
    return sorted(order[best[end][1] : end])
