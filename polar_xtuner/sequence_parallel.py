"""One pack over several ranks: each computes a slice of its tokens, attention sees all of them.

The ranks of a sequence-parallel group (`sequence_parallel_size` of xtuner) get the same pack. It is
padded to a multiple of the group's size, and each rank takes a contiguous slice through embedding,
norms and linear layers, so that a rank holds 1/size of the pack's activations. Around the attention
of every layer, xtuner's all-to-all exchanges tokens for heads and back (DeepSpeed-Ulysses, arXiv
2309.14509): a rank attends with 1/size of the heads over all tokens, by the same layout as without,
shared prefixes included. Padding is dropped before and put back after.

A layer has two exchanges, in which a rank sends at most (2 + 2 KV heads / heads) / size times the
pack's hidden states; as many in the backward pass, and two more where activation checkpointing
computes the layer again. So it is for packs that one device has no room for, not for speed.

Each rank computes the rewards of the rows in its slice; the group adds them up, so that every rank
has all rewards and the same loss. A rank's gradient is then the part that goes through its slice.
The parts of a group are to be added, but the engines average over all ranks: the gradient of the
rewards is multiplied by the group's size.

Shapes: T tokens of the pack, S tokens of a slice, H heads, G KV heads, D head size, E hidden size,
C candidates.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def sequence_parallel_size() -> int:
    """Ranks that share a pack; 1 without `torch.distributed` or xtuner's sequence parallelism."""
    group = _group()
    return 1 if group is None else dist.get_world_size(group)


def data_parallel_size() -> int:
    """Packs that all ranks compute at once: the sequence-parallel groups."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return world // sequence_parallel_size()


def data_parallel_rank() -> int:
    """Which of these packs is this rank's: the number of its sequence-parallel group."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return rank // sequence_parallel_size()  # xtuner's groups are of consecutive ranks


def _group() -> Any:
    # Whoever set up sequence parallelism has imported xtuner; scoring does without it. Its own
    # `get_sequence_parallel_world_size` would keep the 1 that it answers before the set-up.
    xtuner = sys.modules.get("xtuner.parallel.sequence")
    if xtuner is None or not dist.is_initialized():
        return None
    return xtuner.get_sequence_parallel_group()


def check_heads(heads: int, kv_heads: int) -> None:
    """Raise ValueError if the ranks of a group cannot divide the KV heads, and with each the query
    heads that share it, evenly."""
    size = sequence_parallel_size()
    if kv_heads % size:
        fitting = [str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0]
        raise ValueError(
            f"sequence_parallel_size={size} does not divide the {kv_heads} KV heads of the model "
            f"({heads} query heads), and a rank attends with whole ones: set "
            f"sequence_parallel_size to one of {', '.join(fitting)}"
        )


def check_same_pack(input_ids_T: Tensor) -> None:
    """Raise ValueError, on every rank, if the ranks of a group have different packs."""
    places_T = torch.arange(1, len(input_ids_T) + 1, device=input_ids_T.device)
    own = torch.stack([places_T[-1], (input_ids_T * places_T).sum()])
    every = [torch.empty_like(own) for _ in range(sequence_parallel_size())]
    dist.all_gather(every, own, group=_group())
    signatures = [tuple(signature.tolist()) for signature in every]
    if len(set(signatures)) > 1:
        raise ValueError(
            f"the {len(every)} ranks of a sequence-parallel group have different packs (of "
            f"{', '.join(str(tokens) for tokens, _ in signatures)} tokens): each must get the pack "
            "of its sequence_parallel.data_parallel_rank(), as PackSampler does"
        )


def own_slice(x_T: Tensor) -> Tensor:
    """(T,) -> (S,): this rank's slice; the last ones may end in padding, which is 0."""
    size, rank = sequence_parallel_size(), dist.get_rank(_group())
    length = _slice_length(len(x_T), size)
    return F.pad(x_T, (0, size * length - len(x_T)))[rank * length : (rank + 1) * length]


def slices_to_heads(
    q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All `tokens` of the pack, T, for this rank's heads: (T, H/size, D) and twice (T, G/size, D).

    Query heads stay with the KV head that they share.
    """
    from xtuner.parallel.sequence import all_to_all

    groups = k_SGD.shape[1]
    parts = (q_SHD.unflatten(1, (groups, -1)), k_SGD.unsqueeze(2), v_SGD.unsqueeze(2))
    qkv = all_to_all(torch.cat(parts, dim=2), _group(), scatter_dim=1, gather_dim=0)[:tokens]
    q, k, v = qkv.split([part.shape[2] for part in parts], dim=2)
    return q.flatten(1, 2), k.squeeze(2), v.squeeze(2)


def heads_to_slices(x_THD: Tensor) -> Tensor:
    """(T, H/size, D) -> (S, H, D): this rank's slice of the tokens, all heads."""
    from xtuner.parallel.sequence import all_to_all

    size = sequence_parallel_size()
    padding = size * _slice_length(len(x_THD), size) - len(x_THD)
    padded = F.pad(x_THD, (0, 0, 0, 0, 0, padding))
    return all_to_all(padded, _group(), scatter_dim=0, gather_dim=1)


def rewards_of(
    head: Callable[[Tensor], Tensor], hidden_SE: Tensor, reward_rows_C: Tensor
) -> Tensor:
    """(C,): what `head` makes of the hidden states at those rows of the pack, on every rank.

    `hidden_SE` are those of the decoder: of this rank's slice, of the whole pack without sequence
    parallelism. Backward from the same loss on every rank; the *mean* of the gradients over all
    ranks is then what it is without sequence parallelism.
    """
    group = _group()
    if sequence_parallel_size() == 1:
        return head(hidden_SE[reward_rows_C])
    last = len(hidden_SE) - 1
    rows_C = reward_rows_C - dist.get_rank(group) * len(hidden_SE)
    # A selection of its own rows would make the host wait for their number. And a rank without any
    # still has to go backward, for its slice's keys and values are what others attended to.
    mine_C = (rows_C >= 0) & (rows_C <= last)
    rewards_C = head(hidden_SE[rows_C.clamp(0, last)])
    return _SumOverGroup.apply(torch.where(mine_C, rewards_C, 0), group)


class _SumOverGroup(torch.autograd.Function):
    """The sum over a group's ranks, each of which goes backward from the same loss.

    Not xtuner's gather, which needs slices of one size and a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.size = dist.get_world_size(group)
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.size * grad, None


def _slice_length(tokens: int, size: int) -> int:
    return -(-tokens // size)
