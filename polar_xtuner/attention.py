"""Causal attention over a pack whose candidates share prefixes.

A pack is a row of pieces: `prefix c0 c1 ... prefix c0 c1 ...`. The first candidate of a group is
plain causal attention over `[prefix c0]`. A later candidate's queries are its suffix, its keys
`[prefix suffix]`, causal with the last query aligned to the last key ("bottom-right"). So the
whole pack is one varlen call whose query and key lengths differ; keys and values are gathered
from the pieces before KV heads are repeated. Gathering is split and cat: the backward of a slice
writes a full-size tensor for every slice.

Backends: `sdpa` runs on any device and is the reference; `flash_attn` is one
`flash_attn_varlen_func` call (flash-attn >= 2.1, the first to align bottom-right). A backend is
never trusted unseen: `choose_backend` compares it with the reference on the device it will run on.
With sequence parallelism it runs on a share of the heads, between two exchanges
(`sequence_parallel`).

Shapes: T tokens, K gathered keys, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from polar_xtuner.collate import PackLayout
from polar_xtuner.sequence_parallel import (
    check_heads,
    heads_to_slices,
    sequence_parallel_size,
    slices_to_heads,
)

logger = logging.getLogger(__name__)

Attention = Callable[[Tensor, Tensor, Tensor, PackLayout], Tensor]

BACKENDS = ("auto", "flash_attn", "sdpa")

CHECK_PIECES = [[9, 5], [17, 3, 1], [1, 2, 8, 1, 130]]
"""Groups that a backend is checked on: one, two and four candidates, suffixes of one token."""


def sdpa_attention(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackLayout) -> Tensor:
    """(T, H, D): attention by `scaled_dot_product_attention`, one call a candidate."""
    groups = k_TGD.shape[1]
    outputs = []
    for q, k, v in zip(
        q_THD.split(layout.query_lengths),
        layout.gather(k_TGD).split(layout.key_lengths),
        layout.gather(v_TGD).split(layout.key_lengths),
    ):
        queries, keys = len(q), len(k)
        # KV heads become the batch, so that their query heads share them as a view.
        q_GHLD = q.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
        k_GHLD = k.permute(1, 0, 2).unsqueeze(1).expand(-1, q_GHLD.shape[1], -1, -1)
        v_GHLD = v.permute(1, 0, 2).unsqueeze(1).expand(-1, q_GHLD.shape[1], -1, -1)
        mask = None if queries == keys else layout.mask(queries, keys)
        out = F.scaled_dot_product_attention(
            q_GHLD, k_GHLD, v_GHLD, attn_mask=mask, is_causal=mask is None
        )
        outputs.append(out.permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(outputs)


def flash_attention(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackLayout) -> Tensor:
    """(T, H, D): attention by one call of flash-attn's varlen kernel."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q_THD,
        layout.gather(k_TGD),
        layout.gather(v_TGD),
        cu_seqlens_q=layout.cu_seqlens_q,
        cu_seqlens_k=layout.cu_seqlens_k,
        max_seqlen_q=layout.max_seqlen_q,
        max_seqlen_k=layout.max_seqlen_k,
        causal=True,
    )


def exchanged(attention: Attention) -> Attention:
    """`attention` over a whole pack, for ranks that each hold a slice of its tokens."""

    def attend(q_SHD: Tensor, k_SGD: Tensor, v_SGD: Tensor, layout: PackLayout) -> Tensor:
        q_THD, k_TGD, v_TGD = slices_to_heads(q_SHD, k_SGD, v_SGD, sum(layout.piece_lengths))
        return heads_to_slices(attention(q_THD, k_TGD, v_TGD, layout))

    return attend


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> Attention:
    """The attention function of a backend, checked on `device` against the reference.

    `auto` is flash_attn on CUDA in half precision where it is installed, else sdpa. With sequence
    parallelism the function takes this rank's slice of the tokens, and all of `heads`.

    Raises:
        ValueError: unknown name, flash_attn where it cannot run, or KV heads that the ranks of a
            sequence-parallel group cannot divide.
        RuntimeError: the backend disagrees with the reference; the message has the numbers.
    """
    backend, reason = backend_for(name, device, dtype)
    check_heads(heads, kv_heads)
    size = sequence_parallel_size()
    attention = sdpa_attention
    if backend == "sdpa":
        logger.info("attention: sdpa%s", f" ({reason})" if reason else "")
    else:
        attention = flash_attention
        share = (heads // size, kv_heads // size, head_dim)
        difference = check_backend(attention, device, dtype, *share)
        logger.info("attention: flash_attn (off the reference by at most %.1e)", difference)
    return attention if size == 1 else exchanged(attention)


def backend_for(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that a name stands for, and why it is not flash_attn where `auto` is not.

    Raises:
        ValueError: unknown name, or flash_attn where it cannot run.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "sdpa":
        return name, ""
    reason = _why_no_flash(device, dtype)
    if name == "flash_attn" and reason:
        raise ValueError(f"attention='flash_attn' cannot run here: {reason}")
    return ("sdpa" if reason else "flash_attn"), reason


def _why_no_flash(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return f"flash-attn needs CUDA, the model is on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn needs float16 or bfloat16, the model computes in {dtype}"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed: pip install 'polar_xtuner[flash]'"
    return ""


@torch.inference_mode(False)  # scoring may be what calls first: the check needs gradients
def check_backend(
    attention: Attention,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> float:
    """Largest error of output and gradients of `attention` on a small random layout.

    Truth is the reference in float64. Every element may be off by four times the largest error
    that the reference itself makes in `dtype`, plus a rounding step: a misaligned mask or a wrong
    gather is off by a hundred times that.

    Raises:
        RuntimeError: `attention` is further off; names the tensor and the numbers.
    """
    layout = PackLayout.of(CHECK_PIECES).to(device)
    tokens = sum(layout.piece_lengths)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(tokens, n, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )

    def run(function: Attention, precision: torch.dtype) -> list[Tensor]:
        leaves = a, b, c = [x.to(precision).requires_grad_() for x in (q, k, v)]
        # Under the autocast of the training step the float64 truth would be rounded as well.
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            out = function(a, b, c, layout)
            return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(precision))]

    truth = run(sdpa_attention, torch.float64)
    reference = run(sdpa_attention, dtype)
    worst = 0.0
    for name, ours, plain, exact in zip(
        ("output", "gradient of q", "gradient of k", "gradient of v"),
        run(attention, dtype),
        reference,
        truth,
    ):
        error = (ours.double() - exact).abs().max().item()
        allowed = 4 * (plain.double() - exact).abs().max().item() + 4 * torch.finfo(dtype).eps
        if not error <= allowed:
            raise RuntimeError(
                f"attention backend {attention.__name__} is wrong on {device} in {dtype}: its "
                f"{name} is off by {error:.3g}, allowed is {allowed:.3g}. Use attention='sdpa', "
                "or install another version of the kernel"
            )
        worst = max(worst, error)
    return worst
