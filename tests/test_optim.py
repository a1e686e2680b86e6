"""The optimizer wrapper steps as mmengine's does, without its reads; the learning rate's curve."""

import math

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

from polar_xtuner.optim import PolarOptimWrapper, WarmupCosineLR


def model_and_wrapper(kind, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, kind(optimizer=optimizer, **options)


def step(model, wrapper, scale=1.0):
    torch.manual_seed(1)
    with wrapper.optim_context(model):
        loss = model(torch.randn(16, 4)).square().mean() * scale
    wrapper.update_params(loss)
    return loss


@pytest.mark.parametrize("clip", [None, {"max_norm": 0.01}, {"type": "value", "clip_value": 0.01}])
@pytest.mark.parametrize("accumulative_counts", [1, 2])
def test_it_steps_to_the_weights_of_mmengines_wrapper(clip, accumulative_counts):
    ends = []
    for kind in (OptimWrapper, PolarOptimWrapper):
        options = {"clip_grad": clip and dict(clip), "accumulative_counts": accumulative_counts}
        model, wrapper = model_and_wrapper(kind, **options)
        for _ in range(4):
            step(model, wrapper)
        ends.append([*model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_the_norm_stays_a_tensor_and_is_that_before_clipping():
    model, wrapper = model_and_wrapper(PolarOptimWrapper, clip_grad={"max_norm": 0.01})
    assert wrapper.grad_norm is None
    step(model, wrapper)
    truth, other = model_and_wrapper(OptimWrapper)
    step(truth, other)
    model, _ = model_and_wrapper(OptimWrapper)
    torch.manual_seed(1)
    model(torch.randn(16, 4)).square().mean().backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(wrapper.grad_norm, norm)


def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_raises_where_asked():
    model, wrapper = model_and_wrapper(PolarOptimWrapper, clip_grad={"max_norm": 1.0})
    step(model, wrapper, scale=float("inf"))
    assert not torch.isfinite(wrapper.grad_norm)
    clip = {"max_norm": 1.0, "error_if_nonfinite": True}
    model, wrapper = model_and_wrapper(PolarOptimWrapper, clip_grad=clip)
    with pytest.raises(RuntimeError, match="non-finite"):
        step(model, wrapper, scale=float("inf"))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, None], ids=str)
def test_the_forward_pass_runs_in_its_dtype_and_the_weights_keep_theirs(dtype):
    model, wrapper = model_and_wrapper(PolarOptimWrapper, dtype=dtype)
    with wrapper.optim_context(model):
        computed = model(torch.randn(2, 4)).dtype
    assert computed == (torch.float32 if dtype is None else torch.bfloat16)
    step(model, wrapper)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float16", torch.float16, "torch.float32", "half"], ids=str)
def test_a_dtype_that_would_need_scaling_or_is_none_is_refused(dtype):
    with pytest.raises(ValueError, match=r"None or 'bfloat16', got .*AmpOptimWrapper"):
        model_and_wrapper(PolarOptimWrapper, dtype=dtype)


def test_configs_find_it_by_name():
    assert OPTIM_WRAPPERS.get("PolarOptimWrapper") is PolarOptimWrapper


# ---- Learning rate


def curve(steps, counts=1, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosineLR(
        optimizer, end=steps * counts, accumulative_counts=counts, by_epoch=False, **options
    )
    rates = []
    for _ in range(steps * counts):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_it_rises_to_the_peak_and_falls_with_a_cosine():
    rates = curve(100, warmup_ratio=0.1, final_lr_ratio=0.25)
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    falling = [0.5 + 1.5 * (1 + math.cos(math.pi * i / 90)) / 2 for i in range(90)]
    assert rates[10:] == pytest.approx(falling)
    assert max(rates) == 2.0


def test_accumulation_and_short_runs_keep_the_curve_of_the_steps():
    plain = curve(20)
    assert curve(20, counts=3)[::3] == plain
    assert curve(20, counts=3)[2::3] == plain
    assert curve(1) == [2.0]
    assert max(curve(10)) == 2.0
