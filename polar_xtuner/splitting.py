"""A group too large for a pack -> groups that fit and hold each of its pairs once.

Each part repeats the prefix, and a candidate is repeated in every part that has a pair of it: few
parts and few repetitions are wanted. Parts are grown one after the other, always by the candidate
that brings most new pairs for its tokens. Where every chosen meets every rejected candidate, that
makes square blocks, which is as good as it gets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def split_pairs(
    pieces: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], cap: int
) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Pairs of each part, and those that fit no part even by themselves.

    Args:
        pieces: (1 + candidates,) lengths of the prefix and of each suffix.
        chosen, rejected: (pairs,) the candidates of each pair.
        cap: most tokens of a part.
    """
    prefix, *suffixes = pieces
    partners: list[dict[int, list[int]]] = [{} for _ in suffixes]  # by the other candidate
    unfit = []
    for pair, (c, r) in enumerate(zip(chosen, rejected)):
        if prefix + suffixes[c] + suffixes[r] > cap:
            unfit.append(pair)
            continue
        partners[c].setdefault(r, []).append(pair)
        partners[r].setdefault(c, []).append(pair)
    parts = []
    while any(partners):
        parts.append(np.array(sorted(_grow(suffixes, partners, cap - prefix)), np.int64))
    return parts, np.array(unfit, np.int64)


def _grow(suffixes: list[int], partners: list[dict[int, list[int]]], room: int) -> list[int]:
    """Take the pairs of one part out of `partners`."""
    gains: dict[int, int] = {}  # new pairs that a candidate would bring
    members: set[int] = set()
    pairs: list[int] = []
    # Where none has a pair with what is there, a part begins anew beside it, with a candidate of
    # many pairs. One that finds no room will not find any later.
    alive = [c for c, others in enumerate(partners) if others]
    seeds = iter(sorted(alive, key=lambda c: (-len(partners[c]), -suffixes[c])))

    def has_room(c: int) -> bool:
        return c not in members and any(suffixes[c] + suffixes[o] <= room for o in partners[c])

    while True:
        fitting = [c for c in gains if suffixes[c] <= room]
        candidate = max(fitting, key=lambda c: (gains[c] / suffixes[c], -c), default=None)
        if candidate is None:
            candidate = next(filter(has_room, seeds), None)
        if candidate is None:
            return pairs
        members.add(candidate)
        room -= suffixes[candidate]
        gains.pop(candidate, None)
        for other in [*partners[candidate]]:
            if other in members:
                pairs += partners[candidate].pop(other)
                del partners[other][candidate]
            else:
                gains[other] = gains.get(other, 0) + len(partners[candidate][other])
