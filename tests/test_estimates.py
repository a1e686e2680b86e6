"""Estimates: parameters as the model has them, activations as autograd keeps them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from polar_xtuner.estimates import (
    PUBLISHED,
    Training,
    activation_bytes,
    estimate,
    memory,
    parameters,
    trained_parameters,
)
from polar_xtuner.modeling_internlm2 import InternLM2Config, InternLM2DecoderLayer, RotaryAngles
from polar_xtuner.packing import ModelShape

SHAPE, VOCABULARY = PUBLISHED["POLAR-7B"]
TRAINING = Training(
    shape=SHAPE,
    vocab_size=VOCABULARY,
    max_packed_length=32768,
    sequence_parallel_size=1,
    ranks=8,
    epochs=1,
    checkpointing=True,
    weight_bytes=4,
    autocast=True,
    lora_rank=None,
    four_bits=False,
    zero=2,
)


def config_of(shape: ModelShape, vocab_size: int) -> InternLM2Config:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    fields: Any = {name: getattr(shape, name) for name in (*names, "num_key_value_heads")}
    return InternLM2Config(vocab_size=vocab_size, bias=False, **fields)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_model(name: str) -> None:
    from polar_xtuner.modeling_internlm2 import InternLM2ForRewardModel

    with torch.device("meta"):
        model = InternLM2ForRewardModel(config_of(*PUBLISHED[name]))
    assert parameters(*PUBLISHED[name]) == sum(p.numel() for p in model.parameters())


def test_adapter_parameters_are_those_that_peft_trains() -> None:
    from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: peft needs it)
    from peft import LoraConfig, get_peft_model

    from polar_xtuner.modeling_internlm2 import InternLM2Model

    shape = ModelShape(2, 64, 96, 4, 2)
    model = InternLM2Model(config_of(shape, 50))
    targets = ["wqkv", "wo", "w1", "w2", "w3"]
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=targets))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    with_head = replace(TRAINING, shape=shape, vocab_size=50, lora_rank=8)
    assert trained_parameters(with_head) == trained + 64  # the reward head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_are_what_autograd_keeps(dtype: torch.dtype) -> None:
    """Of a layer, whose attention keeps its four tensors and no scores, as flash-attn does."""
    shape, tokens = ModelShape(1, 256, 640, 8, 2), 100
    layer = InternLM2DecoderLayer(config_of(shape, 50)).to(dtype)
    x = torch.randn(tokens, 256, dtype=dtype, requires_grad=True)
    cos, sin = RotaryAngles(config_of(shape, 50))(torch.arange(tokens), tokens, dtype)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            out = q + k.repeat_interleave(4, 1) + v.repeat_interleave(4, 1)
            ctx.save_for_backward(q, k, v, out)
            return out

    kept: dict[int, int] = {}
    ignored = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), cos, sin)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x, cos, sin, None, lambda q, k, v, layout: Attention.apply(q, k, v))
    size = dtype.itemsize
    expected = activation_bytes(shape, tokens, stream=size, compute=size, checkpointing=False)
    assert out.requires_grad
    assert sum(kept.values()) == pytest.approx(expected, rel=0.01)


def test_zero_divides_what_its_stage_divides() -> None:
    count = parameters(SHAPE, VOCABULARY)
    for stage, expected in ((1, (2, 2, 1.5)), (2, (2, 0.25, 1.5)), (3, (0.25, 0.25, 1.5))):
        found = memory(replace(TRAINING, zero=stage))
        divided = (found.weights, found.gradients, found.optimizer)
        assert [part / count for part in divided] == pytest.approx(expected)
    alone = memory(replace(TRAINING, zero=0, ranks=1))
    assert alone.total - alone.activations == pytest.approx(18 * count)


def test_adapters_take_less_and_four_bits_less_still() -> None:
    lora = replace(TRAINING, zero=0, weight_bytes=2, lora_rank=64)
    everything, adapters = memory(replace(TRAINING, zero=0)), memory(lora)
    quantised = memory(replace(lora, four_bits=True))
    assert quantised.weights < adapters.weights < everything.weights
    assert adapters.optimizer == quantised.optimizer < everything.optimizer / 40
    work = [estimate(t, 1000, 100_000).flops for t in (TRAINING, lora)]
    assert 0.66 < work[1] / work[0] < 0.7


def test_time_is_operations_by_speed() -> None:
    found = estimate(TRAINING, 10**9, 10**12, gpu="A100", peak=312e12, mfu=0.5)
    assert found.seconds is not None
    assert found.seconds * 8 * 312e12 * 0.5 == pytest.approx(found.flops)
    assert found.flops > 6 * 6.5e9 * 10**9
    assert estimate(TRAINING, 10**9, 10**12).seconds is None
