"""Lengths -> plan: which groups make which pack, on which rank, in which optimizer step.

Pure functions on numbers: the same arguments give the same plan on every rank, without a word
between them. Groups are shuffled, cut into windows, and best-fit packed within each window: one
after the other, into the fullest pack that still has room. (Longest first, packs would hold few
long groups or many short ones, and what a pair weighs would follow its length.) Packs are then
shuffled and dealt to optimizer steps; every step has `ranks * accumulation` of them. Where the
number does not divide, packs of several groups are split in two until it does; should none be left
to split, the shortest groups go through once more, with no weight.

Each pair of an optimizer step weighs 1/N, N the pairs of the whole step over all its packs. The
engines average over ranks and accumulation slots, so a pack carries the weight
`ranks * accumulation / N`: loss and gradient do not depend on how the pairs were packed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 4096
"""Groups that are packed together: large enough to fill packs, small against an epoch."""


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


@dataclass(frozen=True, slots=True)
class Pack:
    """Groups that go through the model together, and what each of their pairs weighs."""

    groups: tuple[int, ...]
    pair_weight: float


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


def plan_epoch(
    lengths: NDArray[np.int64],
    pairs: NDArray[np.int64],
    cap: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    ranks: int = 1,
    accumulation: int = 1,
) -> list[list[list[Pack]]]:
    """The epoch as `plan[step][slot][rank]`.

    Args:
        lengths: (groups,) tokens of each group as it is laid out.
        pairs: (groups,) pairs of each group.
        cap: most tokens of a pack.
        seed, epoch: two epochs of one seed have different orders.
        ranks: data-parallel size.
        accumulation: packs a rank adds up before it steps.

    Raises:
        ValueError: a group is longer than the cap, or there are fewer groups than
            ranks * accumulation.
    """
    per_step = ranks * accumulation
    if len(lengths) < per_step:
        raise ValueError(
            f"{len(lengths)} groups cannot fill one optimizer step of {ranks} ranks x "
            f"{accumulation} accumulation steps: use fewer ranks, a smaller accumulative_counts, "
            "or more data"
        )
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    packs = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        packs += [window[p] for p in best_fit(lengths[window], cap)]
    packs = _split_to_multiple(packs, per_step)
    trained = len(packs)
    packs += [*np.argsort(lengths)[: -trained % per_step, None]]
    shuffled = random.permutation(len(packs))
    plan = []
    for start in range(0, len(shuffled), per_step):
        step = shuffled[start : start + per_step]
        weight = per_step / sum(int(pairs[packs[i]].sum()) for i in step if i < trained)
        ready = [Pack(tuple(packs[i].tolist()), weight if i < trained else 0.0) for i in step]
        plan.append([ready[slot : slot + ranks] for slot in range(0, per_step, ranks)])
    return plan


def _split_to_multiple(packs: list[NDArray[np.int64]], multiple: int) -> list[NDArray[np.int64]]:
    """Split the packs with most groups until their number is a multiple, or no pack is left."""
    packs = sorted(packs, key=len)
    while len(packs) % multiple and len(packs[-1]) > 1:
        largest = packs.pop()
        for part in (largest[::2], largest[1::2]):
            insort(packs, part, key=len)
    return packs
