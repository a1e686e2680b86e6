"""Attention over packs: the reference backend, the flash-attn call, and the check at start."""

import importlib.machinery
import math
import sys
import types

import pytest
import torch

from polar_xtuner import attention
from polar_xtuner.attention import check_backend, choose_backend, flash_attention, sdpa_attention
from polar_xtuner.collate import PackLayout

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

CPU = torch.device("cpu")
NAMES = ("output", "gradient of q", "gradient of k", "gradient of v")


def random_groups(generator):
    """Groups as lengths of the prefix and of the suffixes, some of them a single token."""

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    return [
        [number(1, 12), *(number(1, 9) if number(0, 3) else 1 for _ in range(number(1, 6)))]
        for _ in range(number(1, 4))
    ]


def random_case(seed, heads, kv_heads, head_dim=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    groups = random_groups(generator)
    tokens = sum(map(sum, groups))
    tensors = [
        torch.randn(tokens, n, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    ]
    return groups, tensors


def one_sequence(q, k, v):
    """Causal attention of one whole sequence, written out: (L, H, D) and (L, G, D) -> (L, H, D)."""
    length, heads, head_dim = q.shape
    share = heads // k.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    outputs = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head // share].T / math.sqrt(head_dim)
        weights = scores.masked_fill(future, -math.inf).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        outputs.append(weights @ v[:, head // share])
    return torch.stack(outputs, dim=1)


def one_sequence_at_a_time(q, k, v, groups):
    """What the pack means: every candidate by itself, its prefix in front of it."""
    out = torch.empty_like(q)
    start = 0
    for prefix, *suffixes in groups:
        at = start + prefix
        for number, suffix in enumerate(suffixes):
            rows = [*range(start, start + prefix), *range(at, at + suffix)]
            whole = one_sequence(q[rows], k[rows], v[rows])
            kept = 0 if number == 0 else prefix
            out[rows[kept:]] = whole[kept:]
            at += suffix
        start = at
    return out


def output_and_gradients(function, tensors):
    q, k, v, grad = tensors
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_equal(ours, truth, tolerance):
    for name, a, b in zip(NAMES, ours, truth, strict=True):
        error = ((a - b).norm() / b.norm()).item()
        assert error <= tolerance, f"{name} is off by {error:.2e}"


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("seed", range(8))
def test_sdpa_gives_the_attention_of_one_sequence_at_a_time(seed, heads, kv_heads):
    groups, tensors = random_case(seed, heads, kv_heads)
    layout = PackLayout.of(groups)
    ours = output_and_gradients(lambda q, k, v: sdpa_attention(q, k, v, layout), tensors)
    truth = output_and_gradients(lambda q, k, v: one_sequence_at_a_time(q, k, v, groups), tensors)
    assert_equal(ours, truth, 1e-12)


# An emulation of flash_attn.flash_attn_varlen_func on any device, with the faults that a kernel
# or its documentation could have.


def emulated_flash_attn(fault=None):
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert q.dtype == k.dtype == v.dtype
        assert cu_seqlens_q[-1] == len(q)
        assert cu_seqlens_k[-1] == len(k) == len(v)
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        assert max_seqlen_k == cu_seqlens_k.diff().max()
        assert dropout_p == softcap == 0
        assert window_size == (-1, -1)
        assert alibi_slopes is block_table is None
        assert not return_attn_probs
        scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
        if fault == "wrong scale":
            scale = 1 / q.shape[-1]
        if fault == "wrong gather":
            v = v.roll(1, 0)
        wide = torch.promote_types(q.dtype, torch.float32)
        share = q.shape[1] // k.shape[1]
        outputs = []
        queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        for i in range(len(queries) - 1):
            q_HLD = q[queries[i] : queries[i + 1]].to(wide).transpose(0, 1)
            k_HLD = k[keys[i] : keys[i + 1]].to(wide).transpose(0, 1).repeat_interleave(share, 0)
            v_HLD = v[keys[i] : keys[i + 1]].to(wide).transpose(0, 1).repeat_interleave(share, 0)
            scores = scale * q_HLD @ k_HLD.transpose(1, 2)
            if causal and fault != "no mask":
                aligned = 0 if fault == "top-left mask" else k_HLD.shape[1] - q_HLD.shape[1]
                aligned += fault == "sees one token ahead"
                hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + aligned)
                scores = scores.masked_fill(hidden, -math.inf)
            outputs.append((scores.softmax(-1) @ v_HLD).transpose(0, 1))
        out = torch.cat(outputs).to(q.dtype)
        if fault == "NaN":
            out = out.masked_fill(torch.arange(len(out))[:, None, None] == len(out) - 1, math.nan)
        if fault == "wrong gradient":
            out = ScaledGradient.apply(out)
        return out

    return flash_attn_varlen_func


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.5 * grad


@pytest.fixture
def install_flash_attn(monkeypatch):
    def install(fault=None):
        module = types.ModuleType("flash_attn")
        module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
        module.flash_attn_varlen_func = emulated_flash_attn(fault)
        monkeypatch.setitem(sys.modules, "flash_attn", module)

    return install


@pytest.fixture
def flash_attn_runs_here(monkeypatch):
    monkeypatch.setattr(attention, "_why_no_flash", lambda device, dtype: "")


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_one_varlen_call_gives_what_sdpa_gives(install_flash_attn, seed, heads, kv_heads):
    install_flash_attn()
    groups, tensors = random_case(seed, heads, kv_heads)
    layout = PackLayout.of(groups)
    ours = output_and_gradients(lambda q, k, v: flash_attention(q, k, v, layout), tensors)
    truth = output_and_gradients(lambda q, k, v: sdpa_attention(q, k, v, layout), tensors)
    assert_equal(ours, truth, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(4, 4, 8), (4, 2, 16), (8, 1, 64)])
def test_the_check_accepts_a_right_kernel(install_flash_attn, flash_attn_runs_here, dtype, shape):
    install_flash_attn()
    for name in ("auto", "flash_attn"):
        assert choose_backend(name, CPU, dtype, *shape) is flash_attention


FAULTS = (
    "top-left mask",
    "no mask",
    "sees one token ahead",
    "wrong scale",
    "wrong gather",
    "wrong gradient",
    "NaN",
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("shape", [(4, 4, 8), (16, 8, 128)])
def test_the_check_refuses_a_wrong_kernel_with_numbers(
    install_flash_attn, flash_attn_runs_here, fault, dtype, shape
):
    install_flash_attn(fault)
    number = r"(nan|[\d.]+(e[+-]\d+)?)"
    tensor = "gradient of [qkv]" if fault == "wrong gradient" else "output"
    for name in ("auto", "flash_attn"):
        with pytest.raises(
            RuntimeError,
            match=rf"flash_attention is wrong on cpu in {dtype}: its {tensor} is off by {number}, "
            rf"allowed is {number}",
        ):
            choose_backend(name, CPU, dtype, *shape)


def test_the_check_uses_what_makes_shared_prefixes_hard():
    groups = attention.CHECK_PIECES
    assert {len(g) - 1 for g in groups} >= {1, 2, 4}
    assert min(n for g in groups for n in g[2:]) == 1
    assert max(n for g in groups for n in g) > 128, "longer than a kernel's tile"
    layout = PackLayout.of(groups)
    assert layout.query_lengths != layout.key_lengths


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_check_runs_where_the_first_call_needs_no_gradient(install_flash_attn, context):
    install_flash_attn()
    with context():
        check_backend(flash_attention, CPU, torch.bfloat16, 4, 2, 8)
    install_flash_attn("wrong gradient")
    with context(), pytest.raises(RuntimeError, match="gradient of"):
        check_backend(flash_attention, CPU, torch.bfloat16, 4, 2, 8)


def test_the_check_runs_under_autocast(install_flash_attn):
    install_flash_attn()
    with torch.autocast("cpu", torch.bfloat16):
        check_backend(flash_attention, CPU, torch.bfloat16, 4, 2, 8)


def test_the_check_leaves_the_random_state_alone(install_flash_attn):
    install_flash_attn()
    before = torch.get_rng_state()
    check_backend(flash_attention, CPU, torch.float32, 4, 2, 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="auto, flash_attn, sdpa, got 'eager'"):
        choose_backend("eager", CPU, torch.float32, 4, 2, 8)


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cpu", torch.bfloat16, "needs CUDA, the model is on cpu"),
        ("cuda", torch.float32, "needs float16 or bfloat16, the model computes in torch.float32"),
        ("cuda", torch.bfloat16, "not installed: pip install"),
    ],
)
def test_flash_attn_asked_for_by_name_says_why_it_cannot_run(monkeypatch, device, dtype, reason):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match=reason):
        choose_backend("flash_attn", torch.device(device), dtype, 4, 2, 8)
    assert choose_backend("auto", torch.device(device), dtype, 4, 2, 8) is sdpa_attention


def test_a_wrong_kernel_does_not_matter_where_sdpa_is_asked_for(
    install_flash_attn, flash_attn_runs_here
):
    install_flash_attn("NaN")
    assert choose_backend("sdpa", CPU, torch.bfloat16, 4, 2, 8) is sdpa_attention


def test_the_check_is_as_strict_within_the_autocast_of_a_training_step():
    def slightly_wrong(q, k, v, layout):
        return sdpa_attention(q, k, v, layout) * 1.001

    args = (torch.device("cpu"), torch.float32, 4, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert check_backend(sdpa_attention, *args) < 1e-4
        with pytest.raises(RuntimeError, match="slightly_wrong is wrong"):
            check_backend(slightly_wrong, *args)
