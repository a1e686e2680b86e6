"""The InternLM2 decoder and reward head of POLAR checkpoints, over packs.

The tensors have the names, shapes and order of POLAR's checkpoints, so that these load without
remote code; the forward takes one flat pack and its layout instead of a padded batch and a mask.
There is no call without a layout: attention across a pack would be silently wrong.

As in the published code, norms and rotary angles are computed in float32 (in a float64 model, the
norm and the cosines of the angles in float64). The reward head runs in float32 at least, on the
reward rows only: in bfloat16 a reward near 10 moves in steps of 0.06.

Shapes: T tokens of the pack (from the embedding on, with sequence parallelism, of this rank's slice
of it: `sequence_parallel`), E hidden size, H query heads, G KV heads, D head size, C candidates.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from polar_xtuner.attention import Attention, choose_backend
from polar_xtuner.collate import PackLayout
from polar_xtuner.sequence_parallel import (
    check_same_pack,
    own_slice,
    rewards_of,
    sequence_parallel_size,
)

logger = logging.getLogger(__name__)

HEAD = "v_head.weight"


def first_names(names: Sequence[str]) -> str:
    """The first tensors that an error names."""
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def check_safetensors(path: str) -> None:
    """Raise ValueError for a file of a folder's weights that was cut or is no safetensors file.

    The library's own error does not name it.
    """
    for file in sorted(Path(path).glob("model*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged, copy it again: {error}") from None


class InternLM2Config(PretrainedConfig):
    """Shape of an InternLM2 decoder; field names as in POLAR's `config.json`,
    and for a field that it lacks, the default of the published code.

    Raises:
        ValueError: a head count does not divide, or an unknown `rope_scaling`.
    """

    model_type = "internlm2"

    def __init__(
        self,
        vocab_size: int = 103168,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        bias: bool = True,
        rope_theta: float = 10000,
        rope_scaling: dict[str, Any] | None = None,
        reward_token_id: int = 92527,
        pad_token_id: int = 0,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("attn_implementation", None)  # ours is chosen by `choose_backend`
        rope = kwargs.pop("rope_parameters", None)  # transformers 5 writes both as one
        if rope is not None:
            rope_theta = rope.get("rope_theta", rope_theta)
            kind = rope.get("rope_type", "default")
            rope_scaling = None if kind == "default" else {**rope, "type": kind}
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.bias = bias
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.reward_token_id = reward_token_id
        if hidden_size % num_attention_heads or num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={num_attention_heads} must divide hidden_size={hidden_size} "
                f"and be a multiple of num_key_value_heads={self.num_key_value_heads}"
            )
        if rope_scaling is not None and (
            rope_scaling.get("type") not in ("linear", "dynamic")
            or not rope_scaling.get("factor", 0) >= 1
        ):
            raise ValueError(
                f"rope_scaling must be linear or dynamic, with a factor >= 1, got {rope_scaling}"
            )
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of a `config.json`.

        Raises:
            ValueError: it is no object, or another model's: its fields would be taken for ours, and
                those it names otherwise for our defaults.
        """
        path = pretrained_model_name_or_path
        try:
            fields, unused = super().get_config_dict(path, **kwargs)
        except TypeError:  # transformers' where it puts a field into a list or number
            raise ValueError(f"{path}/config.json must hold a JSON object") from None
        kind = fields.get("model_type")
        is_published = fields.get("architectures") == ["InternLM2ForRewardModel"]
        if kind != cls.model_type and not is_published:
            raise ValueError(
                f"{path}/config.json is of model_type {kind}, not {cls.model_type}: a POLAR model, "
                "or an InternLM2 model to start from, is needed"
            )
        return fields, unused


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class RotaryAngles(nn.Module):
    """cos and sin of every position, (T, 1, D), in `dtype`.

    `linear` scaling divides positions. `dynamic` NTK scaling leaves them alone up to
    `max_position_embeddings`; beyond, it would give every length a base of its own, and a shared
    prefix could not serve candidates of two lengths, so longer packs are refused.
    """

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.theta = config.rope_theta
        scaling = config.rope_scaling or {}
        self.divisor = scaling["factor"] if scaling.get("type") == "linear" else 1.0
        self.dynamic_limit = (
            config.max_position_embeddings if scaling.get("type") == "dynamic" else None
        )

    @torch.no_grad()
    def forward(self, position_ids_T: Tensor, length: int, dtype: torch.dtype) -> Any:
        if self.dynamic_limit is not None and length > self.dynamic_limit:
            raise ValueError(
                f"a sequence of {length} tokens is longer than max_position_embeddings="
                f"{self.dynamic_limit}, where dynamic RoPE scaling would make scores depend on "
                "what they are computed with: lower max_length, or use linear scaling"
            )
        device = position_ids_T.device
        # Computed anew: a buffer would be rounded by `.half()` or left empty by a meta load.
        exponents = torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim
        angles = position_ids_T.float()[:, None] / self.divisor * (1.0 / self.theta**exponents)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        angles = angles.to(torch.promote_types(dtype, torch.float32))
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split convention of InternLM2."""
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cos + torch.cat((-second, first), dim=-1) * sin


class InternLM2Attention(nn.Module):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.wqkv = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.bias)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(
        self, x_TE: Tensor, cos: Tensor, sin: Tensor, layout: PackLayout, attention: Attention
    ) -> Tensor:
        # wqkv holds, for each KV head, its query heads, then its key, then its value.
        # A kernel takes them in one dtype; under autocast a quantised layer answers in float32.
        qkv = self.wqkv(x_TE).to(cos.dtype).unflatten(-1, (self.kv_heads, -1, self.head_dim))
        # Split, for the backward of slicing writes a full-size tensor a slice.
        q, k, v = qkv.split((qkv.shape[2] - 2, 1, 1), dim=2)
        q_THD, k_TGD = (rotate(x.flatten(1, 2), cos, sin) for x in (q, k))
        return self.wo(attention(q_THD, k_TGD, v.squeeze(2), layout).flatten(1))


class InternLM2MLP(nn.Module):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x_TE: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x_TE)) * self.w3(x_TE))


class InternLM2DecoderLayer(nn.Module):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_TE: Tensor, cos: Tensor, sin: Tensor, layout: PackLayout, attention: Attention
    ) -> Tensor:
        x_TE = x_TE + self.attention(self.attention_norm(x_TE), cos, sin, layout, attention)
        return x_TE + self.feed_forward(self.ffn_norm(x_TE))


class InternLM2PreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    config_class = InternLM2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["InternLM2DecoderLayer"]

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, RewardHead):
            module.weight.data.zero_()  # a base without a head starts from reward 0 everywhere
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=std)
            bias = getattr(module, "bias", None)
            if bias is not None:
                bias.data.zero_()
        elif isinstance(module, RMSNorm):
            module.weight.data.fill_(1.0)


class InternLM2Model(InternLM2PreTrainedModel):
    """The decoder: a pack's ids to its last hidden states."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            InternLM2DecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryAngles(config)
        self.attention_backend = "auto"
        """One of `attention.BACKENDS`; checked and settled at the first forward."""
        self._attention: tuple[Any, Attention] | None = None
        self._same_pack_in: set[bool] = set()
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.tok_embeddings = value

    def forward(self, input_ids_T: Tensor, position_ids_T: Tensor, layout: PackLayout) -> Tensor:
        """(T, E): the normed hidden states of a pack; what `sequence_parallel.rewards_of` takes.

        Raises:
            ValueError: with sequence parallelism, the ranks of a group have different packs (seen
                at the first pack in training and in evaluation), or cannot divide the heads.
        """
        if sequence_parallel_size() > 1:
            if self.training not in self._same_pack_in:
                check_same_pack(input_ids_T)
                self._same_pack_in.add(self.training)
            input_ids_T, position_ids_T = own_slice(input_ids_T), own_slice(position_ids_T)
        x_TE = self.tok_embeddings(input_ids_T)
        device, dtype = x_TE.device, x_TE.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        cos, sin = self.rotary(position_ids_T, layout.max_seqlen_k, dtype)
        attention = self._choose_attention(device, dtype)
        for layer in self.layers:
            inputs = (x_TE, cos, sin, layout, attention)
            if self.gradient_checkpointing and self.training:
                x_TE = self._gradient_checkpointing_func(layer.__call__, *inputs)
            else:
                x_TE = layer(*inputs)
        return self.norm(x_TE)

    def _choose_attention(self, device: torch.device, dtype: torch.dtype) -> Attention:
        key = (self.attention_backend, device, dtype)
        if self._attention is None or self._attention[0] != key:
            config = self.config
            heads = (config.num_attention_heads, config.num_key_value_heads)
            self._attention = key, choose_backend(*key, *heads, self.rotary.head_dim)
        return self._attention[1]


class RewardHead(nn.Linear):
    """A bias-free linear map to one reward, in float32 at least."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)

    def forward(self, x_CE: Tensor) -> Tensor:
        """(C,): the rewards of (C, E) hidden states."""
        wide = torch.promote_types(x_CE.dtype, torch.float32)
        with torch.autocast(x_CE.device.type, enabled=False):
            return F.linear(x_CE.to(wide), self.weight.to(wide)).squeeze(-1)


class InternLM2ForRewardModel(InternLM2PreTrainedModel):
    """Decoder and reward head, with the tensor names of a POLAR checkpoint."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.v_head = RewardHead(config.hidden_size)
        self.post_init()

    def forward(
        self, input_ids_T: Tensor, position_ids_T: Tensor, layout: PackLayout, reward_rows_C: Tensor
    ) -> Tensor:
        """(C,): the reward of each candidate of a pack, float32 at least."""
        hidden_TE = self.model(input_ids_T, position_ids_T, layout)
        return rewards_of(self.v_head, hidden_TE, reward_rows_C)

    @classmethod
    def empty(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> InternLM2ForRewardModel:
        """What `from_pretrained` would give, on the meta device: shapes and dtypes, no values."""
        dtype = kwargs.pop("torch_dtype", None)
        config, _ = cls.config_class.from_pretrained(
            pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
        )
        if dtype == "auto":
            dtype = config.torch_dtype
        elif isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        with torch.device("meta"):
            model = cls(config)
        return model.to(dtype or torch.float32)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, needs_head: bool = False, **kwargs: Any
    ) -> InternLM2ForRewardModel:
        """Load a checkpoint of `.bin` or safetensors shards; no remote code is run.

        Unless `needs_head`, the reward head may be missing (a language model to start from); it
        starts at zero.

        Raises:
            ValueError: the checkpoint is of another model, a file is damaged, or a tensor is
                missing; names it.
        """
        path = pretrained_model_name_or_path
        check_safetensors(path)
        kwargs.pop("trust_remote_code", None)
        if kwargs.get("low_cpu_mem_usage") and kwargs.get("device_map") is None:
            # Else transformers 4.48 takes empty tensors of one size for tied ones: a missing norm
            # or head would not be reported, and stay empty.
            kwargs["device_map"] = "cpu"
        model, info = super().from_pretrained(path, output_loading_info=True, **kwargs)
        missing = sorted(set(info["missing_keys"]) - {HEAD})
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} tensors of an InternLM2 reward model: "
                f"{first_names(missing)}"
            )
        if HEAD in info["missing_keys"] and needs_head:
            raise ValueError(
                f"{path} has no reward head ({HEAD}), all its rewards would be 0: it is a language "
                "model to start training from"
            )
        if HEAD in info["missing_keys"]:
            logger.warning("%s has no reward head (%s): it starts at zero", path, HEAD)
        if info["unexpected_keys"]:
            logger.warning("%s has tensors that are not used: %s", path, info["unexpected_keys"])
        return model
