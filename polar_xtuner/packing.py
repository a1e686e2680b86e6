"""Numbers -> plan: which groups make which pack, on which rank, in which optimizer step.

Pure functions: the same arguments give the same plan on every rank, without a word between them.
Groups are shuffled and cut into windows of whole optimizer steps. The groups of a window are spread
over its packs, the costliest first, each into the pack with least cost so far that has room for it.
So packs cost the same, whichever rank gets them, and each holds its share of long groups and of
short ones: what a pair weighs has nothing to do with its length. There are as few steps as fit.

With `pairs_per_step` a step holds exactly that many pairs, and is a window of its own. A group with
more pairs than a step has left waits for the next one; if enough of them wait, the first is divided
between two steps.

Each pair of an optimizer step weighs 1/N, N the pairs of the whole step over all its packs. The
engines average over ranks and accumulation slots, so a pack carries the weight
`ranks * accumulation / N`: loss and gradient do not depend on how the pairs were packed.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PLAN_VERSION = 1
"""Goes up when the same arguments give another plan: a run cannot be gone on with then."""

WINDOW = 64
"""Packs whose groups are spread together: enough to fill and balance them, few against an epoch."""

FULL = 1.001
"""Packs are first tried as if they could be 99.9 % full."""

WAITING = 64
"""Groups that may wait for a step with room for all their pairs before one is divided."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the cost of a token depends on; the names of an InternLM2 config."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int

    def flops(self, tokens: Any, attended: Any) -> Any:
        """Floating-point operations of forward and backward, for numbers or arrays.

        A multiply-add is two operations, the backward pass twice the forward pass; layers that are
        computed again for activation checkpointing are not counted (as in PaLM, arXiv 2204.02311,
        appendix B). The embedding and the reward head are left out.

        Args:
            tokens: as they are laid out, shared prefixes once.
            attended: pairs of a query and a key that it sees (`attended_pairs`).
        """
        head_size = self.hidden_size // self.num_attention_heads
        qkv = self.hidden_size + 2 * self.num_key_value_heads * head_size
        weights = self.hidden_size * (qkv + self.hidden_size + 3 * self.intermediate_size)
        forward = 2 * weights * tokens + 4 * self.hidden_size * attended
        return 3 * self.num_hidden_layers * forward


def attended_pairs(queries: Any, keys: Any) -> Any:
    """Pairs of a query and a key that it sees, where the last query is aligned to the last key."""
    return queries * keys - queries * (queries - 1) // 2


class Share(NamedTuple):
    """The pairs `start` to `stop` of a group; a whole group, but where a step divides it."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Pack:
    """Groups that go through the model together, and what each of their pairs weighs."""

    shares: tuple[Share, ...]
    pair_weight: float


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The packs of an epoch, for every iteration (a slot of an optimizer step) and rank."""

    ranks: int
    accumulation: int
    shares: NDArray[np.int64]
    """(shares, 3): a `Share` a row, pack by pack."""
    ends: NDArray[np.int64]
    """(packs,): where the shares of each pack end."""
    pair_weights: NDArray[np.float64]
    """(packs,); 0 for a pack that only fills a step."""

    @property
    def iterations(self) -> int:
        """Packs of each rank."""
        return len(self.ends) // self.ranks

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.iterations // self.accumulation

    def rest(self, step: int) -> NDArray[np.int64]:
        """(shares, 3): what is left to do from an optimizer step on, a `Share` a row."""
        pack = step * self.accumulation * self.ranks
        counts = np.diff(self.ends[pack:], prepend=self.ends[pack - 1] if pack else 0)
        shares = self.shares[len(self.shares) - counts.sum() :]
        return shares[np.repeat(self.pair_weights[pack:] > 0, counts)]

    def pack(self, iteration: int, rank: int) -> Pack:
        """What a rank computes in an iteration."""
        number = iteration * self.ranks + rank
        start = self.ends[number - 1] if number else 0
        shares = self.shares[start : self.ends[number]].tolist()
        return Pack(tuple(Share(*s) for s in shares), float(self.pair_weights[number]))


def plan_epoch(
    lengths: NDArray[np.int64],
    pairs: NDArray[np.int64],
    costs: NDArray[np.int64],
    cap: int,
    *,
    pairs_per_step: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    ranks: int = 1,
    accumulation: int = 1,
    rest: NDArray[np.int64] | None = None,
) -> Plan:
    """Where and when each group goes through the model, once an epoch.

    Args:
        lengths: (groups,) tokens of each group as it is laid out.
        pairs: (groups,) pairs of each group.
        costs: (groups,) what each group costs, in any unit (`ModelShape.flops`).
        cap: most tokens of a pack.
        pairs_per_step: pairs of an optimizer step, the last one has the rest; None fills packs.
        seed, epoch: two epochs of one seed have different orders.
        ranks: data-parallel size.
        accumulation: packs a rank adds up before it steps.
        rest: (shares, 3) what is left of an epoch that began with other ranks (`Plan.rest`); None
            plans all groups.

    Raises:
        ValueError: a group is longer than the cap, there are fewer groups than
            ranks * accumulation, or the pairs of a step do not fit its packs.
    """
    per_step = ranks * accumulation
    if len(lengths) and lengths.max() > cap:
        raise ValueError(f"a group of {lengths.max()} tokens cannot fit a pack of {cap}")
    if rest is None and len(lengths) < per_step:
        raise ValueError(
            f"{len(lengths)} groups cannot fill one optimizer step of {ranks} ranks x "
            f"{accumulation} accumulation steps: use fewer ranks, a smaller accumulative_counts, "
            "or more data"
        )
    if rest is None:
        random = np.random.default_rng([seed, epoch])
        whole = np.arange(len(lengths))
        rows = np.stack([whole, np.zeros_like(whole), pairs], axis=1)
    else:
        random = np.random.default_rng([seed, epoch, len(rest)])
        rows = rest
    shares = _Shares(rows[random.permutation(len(rows))], lengths, costs, cap)
    if pairs_per_step is None:
        steps = _filled(shares, per_step, random)
    elif pairs_per_step < per_step:
        raise ValueError(
            f"pairs_per_step={pairs_per_step} is less than one pair for each of the {ranks} ranks "
            f"x {accumulation} accumulation steps: raise it, or lower accumulative_counts"
        )
    else:
        steps = _of_pairs(shares, pairs_per_step, ranks, accumulation)
    shortest = int(lengths.argmin())
    filler = len(shares)
    packs, weights = [], []
    for step in steps:
        weight = per_step / sum(shares.pairs[share] for pack in step for share in pack)
        packs += [pack or [filler] for pack in step]
        weights += [weight if pack else 0.0 for pack in step]
    rows = np.concatenate([shares.rows(), [(shortest, 0, pairs[shortest])]])
    return Plan(
        ranks,
        accumulation,
        rows[[*chain.from_iterable(packs)]],
        np.cumsum([*map(len, packs)]),
        np.array(weights),
    )


Step = list[list[int]]  # the shares of each pack of an optimizer step; empty packs only fill it


class _Shares:
    """What is planned: shares by number, a list a property.

    Python reads lists faster than arrays, and its garbage collector has nothing to look for in
    numbers: 150,000 tuples set it to work on all objects of a process.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        lengths: NDArray[np.int64],
        costs: NDArray[np.int64],
        cap: int,
    ) -> None:
        groups, starts, stops = rows.T
        self.groups = groups.tolist()
        self.starts = starts.tolist()
        self.pairs = (stops - starts).tolist()
        self.lengths = lengths[groups].tolist()
        self.costs = costs[groups].tolist()
        self.cap = cap

    def __len__(self) -> int:
        return len(self.groups)

    def rows(self) -> NDArray[np.int64]:
        """(shares, 3): a `Share` a row."""
        starts = np.array(self.starts)
        return np.stack([np.array(self.groups), starts, starts + self.pairs], axis=1)

    def divide(self, share: int, pairs: int) -> tuple[int, int]:
        """The first `pairs` of a share, and the others."""
        first, others = len(self), len(self) + 1
        for values in (self.groups, self.lengths, self.costs):
            values += [values[share]] * 2
        self.starts += [self.starts[share], self.starts[share] + pairs]
        self.pairs += [pairs, self.pairs[share] - pairs]
        return first, others

    def spread(self, shares: list[int], packs: int) -> tuple[Step, list[int]]:
        """`shares` in so many packs of about the same cost, and those that found no room."""
        spread: Step = [[] for _ in range(packs)]
        room = [self.cap] * packs
        loads = [(0, pack) for pack in range(packs)]  # a heap
        left = []
        too_long = self.cap + 1  # for any pack, as room only shrinks
        for share in self._costliest_first(shares):
            length, cost = self.lengths[share], self.costs[share]
            load, pack = loads[0]
            if length >= too_long:
                left.append(share)
                continue
            if room[pack] >= length:
                heapreplace(loads, (load + cost, pack))
            else:
                fitting = [entry for entry in loads if room[entry[1]] >= length]
                if not fitting:
                    too_long = length
                    left.append(share)
                    continue
                load, pack = min(fitting)
                loads[loads.index((load, pack))] = (load + cost, pack)
                heapify(loads)
            spread[pack].append(share)
            room[pack] -= length
        return spread, left

    def place(self, shares: list[int], packs: int, may_leave: int) -> tuple[Step, list[int]]:
        """`spread`, or `fit` where that leaves `may_leave` tokens or more."""
        spread, left = self.spread(shares, packs)
        return self.fit(shares, packs) if self.tokens(left) >= may_leave else (spread, left)

    def fit(self, shares: list[int], packs: int) -> tuple[Step, list[int]]:
        """The same for groups so long that few fit a pack: each where it leaves least room."""
        fitted = self.fit_all(shares)
        empty: Step = [[] for _ in range(packs - len(fitted))]
        return fitted[:packs] + empty, [*chain.from_iterable(fitted[packs:])]

    def fit_all(self, shares: list[int]) -> Step:
        """`fit` in as many packs as it takes."""
        ordered = self._costliest_first(shares)
        fitted = best_fit(np.array([self.lengths[share] for share in ordered]), self.cap)
        return [[ordered[i] for i in pack] for pack in fitted]

    def _costliest_first(self, shares: list[int]) -> list[int]:
        return sorted(shares, key=self.costs.__getitem__, reverse=True)

    def tokens(self, shares: list[int]) -> int:
        return sum(self.lengths[share] for share in shares)


def _filled(shares: _Shares, per_step: int, random: np.random.Generator) -> list[Step]:
    """As few steps as hold all shares, the packs of a window about equally full."""
    ends = np.cumsum(shares.lengths)
    a_step = shares.cap * per_step
    count = max(math.ceil(ends[-1] / a_step), math.floor(FULL * ends[-1] / a_step))
    windows = min(count, math.ceil(count * per_step / WINDOW))
    firsts = np.arange(windows + 1) * count // windows  # step that each window begins with
    cuts = np.searchsorted(ends, ends[-1] * firsts[1:-1] / count).tolist()
    steps: list[Step] = []
    left: list[int] = []
    for number, (start, stop) in enumerate(pairwise([0, *cuts, len(shares)])):
        window = [*left, *range(start, stop)]
        size = int(firsts[number + 1] - firsts[number])
        may_leave = a_step if number + 1 < windows else 1  # tokens that go to the next window
        packs, left = shares.place(window, size * per_step, may_leave)
        while shares.tokens(left) >= may_leave:
            size = max(size + 1, len(shares.fit_all(window)) // per_step)
            packs, left = shares.place(window, size * per_step, may_leave)
        packs = [packs[i] for i in random.permutation(len(packs))]
        packs.sort(key=bool, reverse=True)  # empty ones last, so that steps share them
        steps += filter(any, (packs[step::size] for step in range(size)))
    return steps


def _of_pairs(shares: _Shares, pairs_per_step: int, ranks: int, accumulation: int) -> list[Step]:
    """Steps of exactly so many pairs, the last one of those that are left."""
    most = min(pairs_per_step, len(shares)) // ranks
    steps = [*_by_pairs(shares, pairs_per_step)]
    packed = _packed(shares, steps, ranks * accumulation)
    if packed is not None:
        return packed
    enough = (a for a in range(accumulation + 1, most + 1) if _packed(shares, steps, ranks * a))
    works = next(enough, None)
    advice = "lower pairs_per_step" if works is None else f"set accumulative_counts={works}"
    raise ValueError(
        f"{pairs_per_step} pairs a step do not fit {ranks} ranks x {accumulation} packs of "
        f"{shares.cap} tokens: {advice}, or raise max_packed_length"
    )


def _packed(shares: _Shares, steps: list[list[int]], packs: int) -> list[Step] | None:
    packed = []
    for members in steps:
        step, left = shares.place(members, packs, may_leave=1)
        if left:
            return None
        packed.append(step)
    return packed


def _by_pairs(shares: _Shares, pairs_per_step: int) -> Iterator[list[int]]:
    stream = iter(range(len(shares)))
    waiting: list[int] = []
    while True:
        earlier = iter(waiting)
        coming = chain(earlier, stream)
        step: list[int] = []
        waiting = []
        room = pairs_per_step
        while room and len(waiting) <= WAITING and (share := next(coming, None)) is not None:
            pairs = shares.pairs[share]
            if pairs <= room:
                step.append(share)
                room -= pairs
            else:
                waiting.append(share)
        if room and waiting:
            first, waiting[0] = shares.divide(waiting[0], room)
            step.append(first)
        if not step:
            return
        waiting += earlier
        yield step


def best_fit(lengths: NDArray[np.int64], cap: int) -> list[list[int]]:
    """Indices of `lengths` in packs of at most `cap` tokens, by best fit in the given order.

    Raises:
        ValueError: a length is above the cap.
    """
    if len(lengths) and lengths.max() > cap:
        raise ValueError(f"a group of {lengths.max()} tokens cannot fit a pack of {cap}")
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (room left, pack), ascending
    for index, length in enumerate(lengths.tolist()):
        at = bisect_left(open_packs, (length, -1))
        if at == len(open_packs):
            room, pack = cap, len(packs)
            packs.append([])
        else:
            room, pack = open_packs.pop(at)
        packs[pack].append(index)
        insort(open_packs, (room - length, pack))
    return packs
