"""What training would take, from a model's shape: operations, time and memory.

Estimates, computed and not measured on a GPU; what they leave out comes on top.

    operations   `ModelShape.flops`: forward and backward of the plan's tokens, without what
                 activation checkpointing computes again
    time         operations / (GPUs * peak * mfu); mfu, the share of the peak that is reached, is
                 an assumption, and what a run logs under that name
    weights, gradients, optimizer
                 bytes a parameter, of AdamW. With DeepSpeed in bfloat16 2 + 2 + 12 (a float32 copy
                 and two moments), of which ZeRO stage 1 divides the last among the GPUs, 2 the
                 gradients too, 3 all (arXiv 1910.02054, section 5). Without, 4 + 4 + 8 and 2 for
                 the bfloat16 copies that autocast keeps. Frozen weights only have their own bytes,
                 in 4 bits 0.5 + 0.127 / 8 (arXiv 2305.14314, section 3)
    activations  what a full pack keeps for the backward pass, counted tensor by tensor as in arXiv
                 2205.05198, section 4, for this decoder (`activation_bytes`)

Left out: temporary buffers, keys and values repeated for shared prefixes, communication, what CUDA
and the allocator hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from polar_xtuner.data_result import Estimate, Memory
from polar_xtuner.packing import ModelShape

PUBLISHED = {
    "POLAR-7B": (ModelShape(32, 4096, 14336, 32, 8), 92544),
    "POLAR-1_8B": (ModelShape(24, 2048, 8192, 16, 8), 92544),
}
"""Shape and vocabulary of the published models, whose names may go on with "-Base"."""

FOUR_BITS = 0.5 + 0.127 / 8
"""Bytes of a weight in NF4 with its doubly quantised scale."""


@dataclass(frozen=True, slots=True)
class Training:
    """What memory and time depend on, beside the data.

    Attributes:
        shape, vocab_size: of the model.
        max_packed_length: most tokens of a pack.
        sequence_parallel_size: GPUs that share a pack.
        ranks: processes that get packs of their own.
        epochs: of the run.
        checkpointing: layers are computed again in the backward pass.
        weight_bytes: of a weight, as it is loaded; with DeepSpeed 2.
        autocast: whether the forward pass is in bfloat16 where the weights are not.
        lora_rank: None trains all weights.
        four_bits: whether frozen linear layers are quantised to 4 bits.
        zero: stage of ZeRO, 0 without DeepSpeed.
    """

    shape: ModelShape
    vocab_size: int
    max_packed_length: int
    sequence_parallel_size: int
    ranks: int
    epochs: int
    checkpointing: bool
    weight_bytes: int
    autocast: bool
    lora_rank: int | None
    four_bits: bool
    zero: int

    @property
    def gpus(self) -> int:
        return self.ranks * self.sequence_parallel_size


def linear_layers(shape: ModelShape) -> list[tuple[int, int]]:
    """Inputs and outputs of a decoder layer's linear maps: wqkv, wo, w1, w3, w2."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    key_values = 2 * shape.num_key_value_heads * (hidden // shape.num_attention_heads)
    return [
        *((hidden, hidden + key_values), (hidden, hidden)),
        *((hidden, inner), (hidden, inner), (inner, hidden)),
    ]


def parameters(shape: ModelShape, vocab_size: int) -> int:
    """Of an InternLM2 decoder with its reward head; without biases, which POLAR has none of."""
    a_layer = sum(i * o for i, o in linear_layers(shape)) + 2 * shape.hidden_size
    return shape.num_hidden_layers * a_layer + (vocab_size + 2) * shape.hidden_size


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """Of LoRA on all linear layers, and of the reward head, which is trained with it."""
    a_layer = sum(rank * (i + o) for i, o in linear_layers(shape))
    return shape.num_hidden_layers * a_layer + shape.hidden_size


def activation_bytes(
    shape: ModelShape, tokens: float, *, stream: int, compute: int, checkpointing: bool
) -> float:
    """What the decoder keeps of a pack for the backward pass.

    Of a layer and token, E hidden size, K that of keys or values, I intermediate size: each of the
    two norms keeps its input in float32, its normed input as the stream has it, and its output to
    compute with; attention what wqkv answers, of which the values are a part, the turned queries
    and keys, and its output; the feed-forward part the gate before and after SiLU, the other branch
    and their product:

        2 * (4 + stream + compute) * E + compute * (3 * E + 3 * K) + compute * 4 * I

    With checkpointing a layer keeps its input, and one layer at a time all that.

    Args:
        stream: bytes of a number between layers.
        compute: bytes of a number within matrix products.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    keys = shape.num_key_value_heads * (hidden // shape.num_attention_heads)
    norms = 2 * (4 + stream + compute) * hidden
    a_layer = norms + compute * (3 * hidden + 3 * keys + 4 * inner)
    layers = shape.num_hidden_layers
    return tokens * (layers * stream * hidden + a_layer if checkpointing else layers * a_layer)


def memory(training: Training) -> Memory:
    """Of each GPU."""
    t = training
    all_weights = parameters(t.shape, t.vocab_size)
    trained = trained_parameters(t)
    gpus = t.gpus
    if t.zero:
        weights, gradients, optimizer = 2.0, 2.0, 12.0
        optimizer /= gpus
        gradients /= gpus if t.zero >= 2 else 1
        weights /= gpus if t.zero >= 3 else 1
    else:
        weights = 4.0 + (2.0 if t.autocast else 0.0)
        gradients, optimizer = 4.0, 8.0
    frozen = 0.0
    if t.lora_rank is not None:
        in_layers = t.shape.num_hidden_layers * sum(i * o for i, o in linear_layers(t.shape))
        a_linear = FOUR_BITS if t.four_bits else float(t.weight_bytes)
        frozen = a_linear * in_layers + t.weight_bytes * (all_weights - in_layers)
        frozen /= gpus if t.zero >= 3 else 1
    stream = 2 if t.zero else t.weight_bytes
    compute = 2 if t.zero or t.autocast else t.weight_bytes
    tokens = t.max_packed_length / t.sequence_parallel_size
    return Memory(
        weights=weights * trained + frozen,
        gradients=gradients * trained,
        optimizer=optimizer * trained,
        activations=activation_bytes(
            t.shape, tokens, stream=stream, compute=compute, checkpointing=t.checkpointing
        ),
    )


def trained_parameters(training: Training) -> int:
    """All, or the adapters and the reward head."""
    if training.lora_rank is None:
        return parameters(training.shape, training.vocab_size)
    return adapter_parameters(training.shape, training.lora_rank)


def estimate(
    training: Training,
    tokens: int,
    attended: int,
    *,
    gpu: str | None = None,
    peak: float | None = None,
    mfu: float = 0.4,
) -> Estimate:
    """What an epoch of so many tokens takes.

    Args:
        tokens: computed in an epoch.
        attended: pairs of a query and a key that it sees.
        gpu: its name.
        peak: operations a second of one GPU in bfloat16; None leaves the time out.
        mfu: share of the peak that is reached.
    """
    flops = float(training.shape.flops(tokens, attended))
    if training.lora_rank is not None:  # frozen weights get no gradients, a third of the work
        flops -= float(training.shape.flops(tokens, 0)) / 3
    return Estimate(
        parameters=parameters(training.shape, training.vocab_size),
        trained_parameters=trained_parameters(training),
        flops=flops,
        epochs=training.epochs,
        gpus=training.gpus,
        gpu=gpu,
        mfu=mfu,
        seconds=None if peak is None else flops / (training.gpus * peak * mfu),
        zero=training.zero,
        memory=memory(training),
    )
