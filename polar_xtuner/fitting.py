"""Groups of a store -> what is planned: groups that fit a pack, and parts of those that do not."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polar_xtuner.cache import TokenStore, attended_by
from polar_xtuner.splitting import split_pairs

Ints = NDArray[np.int64]


class Fitted(NamedTuple):
    """What an epoch is planned with: the groups of a store that fit a pack, then the parts."""

    whole: Ints
    """(whole groups,) their numbers in the store."""
    parts: list[tuple[int, Ints]]
    """Of each part its group's number in the store, and which of its pairs it has."""
    lengths: Ints
    """(groups and parts,) tokens."""
    pair_counts: Ints
    """(groups and parts,) pairs."""
    attended: Ints
    """(groups and parts,) pairs of a query and a key that it sees."""
    unfit: list[tuple[NDArray[Any], int]]
    """Pairs that no pack has room for, as the store has them, and the tokens each would take."""


def fit(store: TokenStore, cap: int) -> Fitted:
    """Split what is longer than `cap` tokens."""
    fits = store.lengths <= cap
    parts: list[tuple[int, Ints]] = []
    unfit: list[tuple[NDArray[Any], int]] = []
    pieces: list[Ints] = []
    for number in np.flatnonzero(~fits).tolist():
        group = store[number]
        chosen, rejected = group.pairs["chosen"], group.pairs["rejected"]
        prefix, suffixes = group.pieces[:1], group.pieces[1:]
        within, long = split_pairs(group.pieces.tolist(), chosen.tolist(), rejected.tolist(), cap)
        for part in within:
            parts.append((number, part))
            used = np.unique([chosen[part], rejected[part]])
            pieces.append(np.concatenate([prefix, suffixes[used]]))
        lengths = prefix + suffixes[chosen[long]] + suffixes[rejected[long]]
        unfit += zip(group.pairs[long], lengths.tolist())
    firsts = np.cumsum([0, *map(len, pieces[:-1])])
    added: list[Any] = [
        [part.sum() for part in pieces],
        [len(pairs) for _, pairs in parts],
        attended_by(np.concatenate(pieces), firsts) if pieces else [],
    ]
    stored = (store.lengths, store.pair_counts, store.attended)
    lengths, pair_counts, attended = (
        np.append(values[fits], np.array(more, np.int64)) for values, more in zip(stored, added)
    )
    return Fitted(np.flatnonzero(fits), parts, lengths, pair_counts, attended, unfit)
