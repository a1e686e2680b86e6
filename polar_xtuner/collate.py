"""A pack -> the tensors that the model takes.

A pack is a row of pieces, `prefix c0 c1 ... prefix c0 c1 ...`. A query segment is `[prefix c0]`
or a later candidate's suffix; its keys are `[prefix suffix]`, gathered from the pieces by their
numbers. Names end in the shape of a tensor: T tokens of the pack, C candidates, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polar_xtuner.cache import Group


@dataclass(frozen=True)
class PackLayout:
    """Who attends to whom in a pack of C candidates."""

    cu_seqlens_q: Tensor
    """(C + 1,) int32: where each candidate's queries start; they cover the pack in order."""
    cu_seqlens_k: Tensor
    """(C + 1,) int32: where each candidate's keys start among the gathered keys."""
    max_seqlen_q: int
    max_seqlen_k: int
    query_lengths: list[int]
    key_lengths: list[int]
    piece_lengths: list[int]
    """Lengths of the pack's pieces, in order; they sum to T."""
    key_gather: list[int]
    """Numbers of the pieces whose concatenation is the gathered keys, of length K."""

    def gather(self, x_TGD: Tensor) -> Tensor:
        """(T, G, D) -> (K, G, D): each candidate's keys or values, one after the other."""
        pieces = x_TGD.split(self.piece_lengths)
        return torch.cat([pieces[i] for i in self.key_gather])

    def mask(self, queries: int, keys: int) -> Tensor:
        """(queries, keys) bool, True where a later candidate's query sees a key; a view."""
        shift = self._most_prefix - (keys - queries)
        return self._band[:queries, shift : shift + keys]

    @cached_property
    def _most_prefix(self) -> int:
        return max(k - q for q, k in zip(self.query_lengths, self.key_lengths))

    @cached_property
    def _band(self) -> Tensor:
        """One triangle for all candidates and layers; a longer prefix begins further left in it."""
        later = [q for q, k in zip(self.query_lengths, self.key_lengths) if q < k]
        queries, prefix = max(later, default=0), self._most_prefix
        device = self.cu_seqlens_q.device
        return torch.ones(queries, prefix + queries, dtype=torch.bool, device=device).tril(prefix)

    @classmethod
    def of(cls, groups: Iterable[Sequence[int]]) -> PackLayout:
        """The layout of groups, each given as the lengths of its prefix and its suffixes."""
        pieces: list[int] = []
        gather: list[int] = []
        queries: list[int] = []
        keys: list[int] = []
        for prefix, *suffixes in groups:
            prefix_number = len(pieces)
            pieces.append(prefix)
            for number, suffix in enumerate(suffixes):
                gather += [prefix_number, len(pieces)]
                pieces.append(suffix)
                queries.append(suffix if number else prefix + suffix)
                keys.append(prefix + suffix)
        return cls(
            cu_seqlens_q=_offsets(queries),
            cu_seqlens_k=_offsets(keys),
            max_seqlen_q=max(queries),
            max_seqlen_k=max(keys),
            query_lengths=queries,
            key_lengths=keys,
            piece_lengths=pieces,
            key_gather=gather,
        )

    def to(self, device: torch.device) -> PackLayout:
        return replace(
            self,
            cu_seqlens_q=self.cu_seqlens_q.to(device),
            cu_seqlens_k=self.cu_seqlens_k.to(device),
        )


def collate_pack(instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The single pack of `instances` as `{"data": tensors, "data_samples": {"rows", "pairs"}}`.

    `data` has
        input_ids_T, position_ids_T: int64; a suffix starts again at position len(prefix).
        layout: the fields of a `PackLayout` (a dict, so that mmengine moves it to the device).
        reward_rows_C: int64, where each candidate's reward token stands in the pack.
        chosen_P, rejected_P: int64, the candidates of each pair.
        pair_weights_P, margins_P: float64.
    `rows` says where the pack's rows stand, `pairs` is (P,) of dtype `cache.PAIR`.

    Raises:
        ValueError: not exactly one instance.
    """
    if len(instances) != 1:
        raise ValueError(
            f"a batch is one pack, got {len(instances)}: set the dataloader's batch_size=1 and "
            "choose max_packed_length"
        )
    (pack,) = instances
    groups: list[Group] = pack["groups"]
    tokens, positions, reward_rows, chosen, rejected = [], [], [], [], []
    start = candidates = 0
    for group in groups:
        prefix, *suffixes = group.pieces.tolist()
        ends = np.cumsum(group.pieces)
        tokens.append(group.tokens)
        positions += [np.arange(prefix), *(np.arange(prefix, prefix + n) for n in suffixes)]
        reward_rows.append(start + ends[1:] - 1)
        chosen.append(candidates + group.pairs["chosen"])
        rejected.append(candidates + group.pairs["rejected"])
        start += int(ends[-1])
        candidates += len(suffixes)
    pairs = np.concatenate([g.pairs for g in groups])
    data = {
        "input_ids_T": _long(tokens),
        "position_ids_T": _long(positions),
        "layout": vars(PackLayout.of(g.pieces.tolist() for g in groups)),
        "reward_rows_C": _long(reward_rows),
        "chosen_P": _long(chosen),
        "rejected_P": _long(rejected),
        "pair_weights_P": torch.full((len(pairs),), pack["pair_weight"], dtype=torch.float64),
        "margins_P": torch.from_numpy(pairs["margin"].copy()),
    }
    return {"data": data, "data_samples": {"rows": pack["rows"], "pairs": pairs}}


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32)


def _long(parts: list[np.ndarray[Any, Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
