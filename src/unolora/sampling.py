"""Which rows of which tasks train at which step: multi-task sampling as a pure function of (seed, step).

Shares. Task t of K has n_t training rows, or `limit` if it has more. Its share of the stream of slots is

    proportional  p_t = n_t / sum_u n_u
    temperature   p_t = (n_t / sum_u n_u)^(1/T), scaled to sum 1      T = 1: proportional; T -> infinity: equal
    equal         p_t = 1 / K                                         (`limit` then changes nothing)

A slot is one example when batches are mixed (B = batch_size slots a step), else a batch of one task (1 slot a step).

Order of tasks. The stream is cut into blocks of L slots. Every block holds the same c_t slots of task t: L p_t rounded
by largest remainder, but at least 1. Block b is those slots in an order shuffled by (seed, b). L doubles from the slots
of one step (of as many steps as K needs) until every c_t is within 2 % of L p_t, or doubling would pass 2^20 slots.
Only then may a share be further off, and only where some p_t is below 1e-4: a tiny task beside a huge one.

Order of rows. Draw j of task t (j = 0, 1, ... along the stream) is element j mod n of pass j div n, n being all rows of
the task; `limit` lowers its share, never its choice of rows. A pass is a permutation of them, keyed by (seed, t, pass):
a shuffle of up to LARGE rows, and for more a Feistel network, which computes each place by itself in no memory.
A slot of block b is the task's slot number b c_t plus its earlier ones in that block, so nothing is replayed; slot m
holds draw m, or, if a slot is a batch, draws m B to m B + B - 1.

What holds, and is tested:
1. `batch(step)` depends on the arguments alone: any order of calls, any process, any machine gives the same rows.
2. Resuming at a step costs one block and one shuffle per task of up to LARGE rows, whatever the step.
3. Every row of a task is seen once before any row of it is seen again.
4. After each whole block of steps the numbers of examples per task are exact, not just expected.
5. Ranks share one global batch: 1, 2 or 4 processes train on the same batches.

A shuffle sorts raw 64-bit Philox words, for NumPy promises those, but not its `permutation`, to stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unolora.errors import InputError, unknown

STRATEGIES = ("proportional", "temperature", "equal")
TOLERANCE = 0.02
MAX_SLOTS = 2**20
LARGE = 2**20  # rows from which a shuffle, 8 bytes a row, would be felt; smaller tasks keep the order they always had
ROUNDS = 8
BLOCKS, PASSES = 0, 1  # the first word of a shuffle's key, so that no block shares its random numbers with a pass


class Sampler:
    """Draw the batches of several tasks, as the head of this file defines them.

    Args:
        sizes: Training rows of each task [K], each at least 1.
        batch_size: Examples in a global batch.
        seed: Not negative; another seed gives another order of the same shares.
        strategy: "proportional", "temperature" or "equal".
        temperature: T above; used by "temperature" only.
        limit: A task with more rows counts as one with `limit` rows when shares are computed.
        mixed: Whether a batch mixes tasks; if not, each batch is of one task.

    Attributes:
        probabilities: p_t [K], sums to 1.
        block_steps: Steps in a block; after a multiple of them `counts` is exactly proportional to c_t.

    Raises:
        InputError: An argument makes no sense; the message says which.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        batch_size: int,
        seed: int = 0,
        strategy: str = "temperature",
        temperature: float = 10.0,
        limit: int | None = None,
        mixed: bool = True,
    ) -> None:
        _refuse_nonsense(sizes, batch_size, seed, strategy, temperature, limit)
        self.sizes = [int(n) for n in sizes]
        self.batch_size, self.seed, self.mixed = batch_size, seed, mixed
        self.probabilities = _probabilities(self.sizes, strategy, temperature, limit)  # [K]
        self._step_slots = batch_size if mixed else 1
        self._slot_examples = 1 if mixed else batch_size
        self._counts = _block_counts(self.probabilities, self._step_slots)  # c [K]
        self._slots = int(self._counts.sum())  # L
        self.block_steps = self._slots // self._step_slots
        # Only the latest block and each task's latest pass are kept: training walks forward, so each is made once.
        self._block: tuple[int, NDArray[np.int32], NDArray[np.int32]] | None = None
        self._passes: dict[int, tuple[int, NDArray[np.integer] | Feistel]] = {}

    def batch(self, step: int) -> list[tuple[int, int]]:
        """Return the global batch of a step, counted from 0: (task, row in its training split), `batch_size` times.

        Raises:
            InputError: The step is negative.
        """
        block, first = self._locate(step)
        tasks, earlier = self._tasks(block)
        pairs: list[tuple[int, int]] = []
        for slot in range(first, first + self._step_slots):
            task = int(tasks[slot])
            draw = (block * int(self._counts[task]) + int(earlier[slot])) * self._slot_examples
            pairs += [(task, self._row(task, j)) for j in range(draw, draw + self._slot_examples)]
        return pairs

    def local_batch(self, step: int, rank: int, world_size: int) -> list[tuple[int, int]]:
        """Return rank's part of the global batch: its rows rank, rank + world_size, rank + 2 world_size, ...

        Raises:
            InputError: The ranks cannot share the batch equally, there is no such rank, or the step is negative.
        """
        if not 0 <= rank < world_size:
            raise InputError(f"rank must lie in 0..world_size - 1, got rank {rank} of {world_size}")
        if self.batch_size % world_size:
            raise InputError(
                f"batch_size {self.batch_size} must be a multiple of the number of processes, {world_size}"
            )
        return self.batch(step)[rank::world_size]

    def counts(self, steps: int) -> NDArray[np.int64]:
        """Return the examples of each task in the first `steps` batches [K], without drawing them.

        Raises:
            InputError: `steps` is negative.
        """
        block, slots = self._locate(steps)
        counts = block * self._counts
        if slots:
            counts += np.bincount(self._tasks(block)[0][:slots], minlength=len(self.sizes))
        return counts * self._slot_examples

    def _locate(self, step: int) -> tuple[int, int]:
        """The block a step lies in, and its first slot there."""
        if step < 0:
            raise InputError(f"steps are counted from 0, got {step}")
        block, step_in_block = divmod(int(step), self.block_steps)
        return block, step_in_block * self._step_slots

    def _tasks(self, block: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The task of each slot of a block [L], and how many earlier slots of the block have the same task [L]."""
        latest = self._block
        if latest is None or latest[0] != block:
            ids = np.repeat(np.arange(len(self.sizes), dtype=np.int32), self._counts)
            tasks = ids[_shuffled(self._slots, self.seed, BLOCKS, block)]
            starts = np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
            earlier = np.empty(self._slots, dtype=np.int32)
            earlier[np.argsort(tasks, kind="stable")] = np.arange(self._slots) - starts
            self._block = latest = (block, tasks, earlier)
        return latest[1:]

    def _row(self, task: int, draw: int) -> int:
        """The row of draw 0, 1, ... of a task."""
        number, place = divmod(draw, self.sizes[task])
        latest = self._passes.get(task)
        if latest is None or latest[0] != number:
            self._passes[task] = latest = (number, _permutation(self.sizes[task], self.seed, PASSES, task, number))
        return int(latest[1][place])


def _refuse_nonsense(
    sizes: Sequence[int], batch_size: int, seed: int, strategy: str, temperature: float, limit: int | None
) -> None:
    if strategy not in STRATEGIES:
        raise unknown("sampling strategy", strategy, STRATEGIES)
    if not len(sizes):
        raise InputError("sampling needs at least one task, got none")
    if empty := [task for task, n in enumerate(sizes) if n < 1]:
        raise InputError(f"every task needs at least 1 training row, got {sizes[empty[0]]} for task {empty[0]}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    if not temperature > 0:  # written so that NaN is refused too
        raise InputError(f"temperature must be above 0 (1 samples in proportion to size), got {temperature}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1 row, or none at all, got {limit}")


def _probabilities(sizes: Sequence[int], strategy: str, temperature: float, limit: int | None) -> NDArray[np.float64]:
    rows = np.minimum(np.asarray(sizes, dtype=np.float64), np.inf if limit is None else limit)  # [K]
    exponent = {"proportional": 1.0, "temperature": 1 / temperature, "equal": 0.0}[strategy]
    weights = (rows / rows.max()) ** exponent  # over the largest, not the sum: the largest stays 1 for any T
    return np.asarray(weights / weights.sum())


def _block_counts(p: NDArray[np.float64], step_slots: int) -> NDArray[np.int64]:
    """Slots of each task in a block [K]; their sum L is a multiple of `step_slots`."""
    slots = step_slots * -(-len(p) // step_slots)
    counts = _apportion(p, slots)
    while np.any(np.abs(counts - slots * p) > TOLERANCE * slots * p) and 2 * slots <= MAX_SLOTS:
        slots *= 2
        counts = _apportion(p, slots)
    return counts


def _apportion(p: NDArray[np.float64], slots: int) -> NDArray[np.int64]:
    """Whole numbers of at least 1 that sum to `slots`, as near to `slots * p` as largest remainders come [K]."""
    # Rounded, so that the last bit of a power, which differs between processors, decides nothing.
    share = np.round(slots * p, 6)
    rare = share < 1
    while np.any(share < 1):  # what it costs to lift rare tasks to 1, the others pay in proportion
        rare |= share < 1
        share = np.where(rare, 1.0, np.round((slots - rare.sum()) * p / p[~rare].sum(), 6))
    counts = np.floor(share).astype(np.int64)
    neediest = np.argsort(counts - share, kind="stable")
    counts[neediest[: slots - counts.sum()]] += 1
    return counts


class Feistel:
    """A permutation of 0..n-1 that computes each element by itself.

    A Feistel network permutes the numbers of an even number of bits, whatever its round function is; one that falls
    outside 0..n-1 is sent through again until it does not ("cycle walking", Black and Rogaway 2002), which takes less
    than four turns on average. The round function is the finalizer of SplitMix64 on one half plus the round's key.

    Args:
        n: At least 1.
        seed, key: What the permutation depends on, beside n.
    """

    def __init__(self, n: int, seed: int, *key: int) -> None:
        self.n = n
        self.half = max(1, ((n - 1).bit_length() + 1) // 2)
        words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(ROUNDS)
        self.keys = [int(word) for word in words]

    def __getitem__(self, place: int) -> int:
        """Return the element at a place."""
        if not 0 <= place < self.n:
            raise IndexError(place)
        half, mask = self.half, (1 << self.half) - 1
        while True:
            left, right = place >> half, place & mask
            for key in self.keys:
                left, right = right, left ^ (_mixed(right + key) & mask)
            place = left << half | right
            if place < self.n:
                return place


def _mixed(x: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    x &= 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def _permutation(n: int, seed: int, *key: int) -> NDArray[np.integer] | Feistel:
    """A permutation of 0..n-1 that depends on n, the seed and the key alone."""
    if n > LARGE:
        return Feistel(n, seed, *key)
    return _shuffled(n, seed, *key).astype(np.min_scalar_type(n))


def _shuffled(n: int, seed: int, *key: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1 that depends on n, the seed and the key alone [n]."""
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(n)
    return np.argsort(words, kind="stable")
