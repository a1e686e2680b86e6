"""The mmengine model: builds a POLAR model, trains it on packs, exports it.

`llm` and `v_head` are the parts of a checkpoint, as in xtuner's own `RewardModel`, so their
tensors have the same names. `lora`, `peft_model` and `llm.quantization_config` mean what they
mean there.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import logging
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from xtuner.model.utils import find_all_linear_names, get_peft_model_state_dict, traverse_dict
from xtuner.registry import BUILDER

from polar_xtuner.attention import BACKENDS
from polar_xtuner.collate import PackLayout
from polar_xtuner.conversion import ConversionError, StoredTensor, merged
from polar_xtuner.export import export_hf
from polar_xtuner.losses import BradleyTerryLoss
from polar_xtuner.metrics import pair_sums
from polar_xtuner.modeling_internlm2 import InternLM2ForRewardModel, first_names
from polar_xtuner.sequence_parallel import rewards_of

logger = logging.getLogger(__name__)


class PackToDevice(BaseDataPreprocessor):  # type: ignore[misc]
    """Copies a pack's tensors to the model's device, without waiting where they are pinned.

    mmengine's own looks at every element of the layout's lists: a millisecond a pack.
    """

    def __init__(self) -> None:
        super().__init__(non_blocking=True)

    def cast_data(self, data: Any) -> Any:
        if isinstance(data, dict):
            return {name: self.cast_data(value) for name, value in data.items()}
        return super().cast_data(data) if isinstance(data, Tensor) else data


@BUILDER.register_module()
@MODELS.register_module()
class PolarRewardModel(BaseModel):  # type: ignore[misc]
    """Decoder, reward head and loss.

    Args:
        llm: an `InternLM2ForRewardModel` or the config of one
            (`type=InternLM2ForRewardModel.from_pretrained`).
        loss: a `BradleyTerryLoss` or its config; None is the published recipe.
        attention: `auto`, `flash_attn` or `sdpa` (`attention.choose_backend`).
        use_activation_checkpointing: compute each layer again in the backward pass.
        lora: a `peft.LoraConfig` or the config of one: train adapters and the reward head only.
            `target_modules=None` is all linear layers of the decoder.
        peft_model: a checkpoint of adapters and head to start from.

    Raises:
        ValueError: an option has no such value.
    """

    def __init__(
        self,
        llm: Any,
        loss: Any = None,
        attention: str = "auto",
        use_activation_checkpointing: bool = True,
        lora: Any = None,
        peft_model: str | None = None,
    ) -> None:
        super().__init__(data_preprocessor=PackToDevice())
        if attention not in BACKENDS:
            raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {attention!r}")
        if isinstance(llm, dict):
            traverse_dict(llm)
            llm = BUILDER.build(llm)
        if not isinstance(llm, InternLM2ForRewardModel):
            raise ValueError(
                "model.llm must build an InternLM2ForRewardModel "
                "(polar_xtuner.modeling_internlm2.InternLM2ForRewardModel.from_pretrained), "
                f"got {type(llm).__name__}"
            )
        base = getattr(llm, "stored", {})  # of `conversion.open_model`
        self._stored = {p: base[name] for name, p in llm.named_parameters() if name in base}
        self.llm: Any = llm.model
        self.v_head = llm.v_head
        self.config = llm.config
        self.llm.attention_backend = attention
        self.loss = BUILDER.build(loss) if isinstance(loss, dict) else loss or BradleyTerryLoss()
        if lora is not None:
            if getattr(llm, "is_quantized", False):
                # Only here: it would also widen the frozen weights of a model that is not.
                prepare_model_for_kbit_training(self.llm, use_gradient_checkpointing=False)
            self._add_lora(BUILDER.build(lora) if isinstance(lora, dict) else lora, peft_model)
        elif peft_model is not None:
            raise ValueError("peft_model is a checkpoint of adapters: it needs lora as well")
        if use_activation_checkpointing:
            self.decoder.gradient_checkpointing_enable({"use_reentrant": False})
        self.pack_loss: Tensor | None = None
        """Loss of this rank's last pack."""
        self._taken: set[str] = set()
        self._built = {name: weakref.ref(p) for name, p in self.named_parameters()}

    @property
    def decoder(self) -> Any:
        """The decoder itself, under adapters if there are any."""
        return self.llm.get_base_model() if hasattr(self.llm, "peft_config") else self.llm

    def _add_lora(self, lora: Any, peft_model: str | None) -> None:
        if lora.target_modules is None:
            lora.target_modules = find_all_linear_names(self.llm)
        self.llm = get_peft_model(self.llm, lora)
        self.v_head.float()
        if peft_model is not None:
            state = load_checkpoint(self, peft_model)
            lacking = sorted(set(self.state_dict()) - set(state.get("state_dict", state)))
            if lacking:
                raise ValueError(
                    f"{peft_model} lacks {len(lacking)} of the adapters' tensors: "
                    f"{first_names(lacking)}"
                )

    def init_weights(self) -> None:
        """Nothing: mmengine's runner asks for it, and would draw loaded adapters anew."""

    def forward(
        self, data: dict[str, Any], data_samples: Any = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Tensor]]:
        """`tensor`: (C,) rewards of the pack's candidates. `predict`: those of its pairs, a list of
        one dict of `chosen` and `rejected`, (P,) each. `loss`: a dict of `loss`, a scalar, and
        `sums`, what the pack adds to `metrics.PAIR_SUMS`; both of this rank.

        Raises:
            ValueError: `data` has no layout, or another mode.
        """
        if "layout" not in data:
            raise ValueError("data has no layout: a pack must come from polar_xtuner.collate_pack")
        layout = PackLayout(**data["layout"])
        hidden_TE = self.decoder(data["input_ids_T"], data["position_ids_T"], layout)
        rewards_C = rewards_of(self.v_head, hidden_TE, data["reward_rows_C"])
        if mode == "tensor":
            return rewards_C
        if mode == "predict":
            return [{side: rewards_C[data[f"{side}_P"]] for side in ("chosen", "rejected")}]
        if mode == "loss":
            return self._losses(rewards_C, data)
        raise ValueError(f"mode must be 'tensor', 'predict' or 'loss', got {mode!r}")

    def _losses(self, rewards_C: Tensor, data: dict[str, Any]) -> dict[str, Tensor]:
        chosen_P, rejected_P = data["chosen_P"], data["rejected_P"]
        weights_P, margins_P = data["pair_weights_P"], data["margins_P"]
        loss = self.loss(rewards_C, chosen_P, rejected_P, weights_P, margins_P)
        self.pack_loss = loss.detach()
        return {"loss": loss, "sums": pair_sums(rewards_C, chosen_P, rejected_P, weights_P)}

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What mmengine's training step asks for: the loss to go backward from, what to report."""
        return losses["loss"], {name: value.detach() for name, value in losses.items()}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All tensors; with LoRA the adapters and the reward head only."""
        state = super().state_dict(*args, **kwargs)
        if not hasattr(self.llm, "peft_config"):
            return state
        trained = get_peft_model_state_dict(self.llm, state_dict=state)
        trained.update({name: state[name] for name in state if name.endswith("v_head.weight")})
        return OrderedDict(trained)  # mmengine sets an attribute on it

    def take(self, name: str, stored: StoredTensor) -> None:
        """Take the parameter `name` from a checkpoint; its dtype becomes the parameter's.

        On the meta device it stays in the checkpoint's files until `to_hf` writes it.

        Raises:
            ConversionError: there is no parameter of that name or shape.
        """
        parameters = dict(self.named_parameters())
        if name not in parameters:
            raise ConversionError(
                f"the checkpoint has a tensor that this model lacks: {name}. Convert with the "
                "config and the --cfg-options (model.lora...) of the run that wrote it"
            )
        parameter = parameters[name]
        if parameter.shape != stored.shape:
            raise ConversionError(
                f"{name} has shape {tuple(stored.shape)} in the checkpoint and "
                f"{tuple(parameter.shape)} in the model that the config builds: "
                "pretrained_model_name_or_path must be the one that the run started from"
            )
        if parameter.is_meta:
            self._stored[parameter] = stored.to(parameter.dtype)
        else:
            parameter.data.copy_(stored.read())
        self._taken.add(name)

    def to_hf(
        self, cfg: Any, save_dir: str, fp32: bool = False, **options: Any
    ) -> None:  # what `xtuner convert pth_to_hf` calls
        """Write the model as a Hugging Face folder in the layout of its base checkpoint.

        The weights keep their dtype (`fp32=True` widens them) and are written as safetensors.
        Called by `xtuner convert pth_to_hf` once it has put a checkpoint's tensors into a model
        built from `cfg.model`.

        Raises:
            ConversionError: the checkpoint lacked tensors; names them.
        """
        trained = set(self.state_dict()) - self._taken
        kept = [n for n, p in self.named_parameters() if n in trained and self._built[n]() is p]
        if kept:
            raise ConversionError(
                f"the checkpoint lacks {len(kept)} of the {len(self.state_dict())} tensors of this "
                f"model: {first_names(kept)}. Nothing was written: "
                "the export would have kept the base model's values for them"
            )
        if hasattr(self.llm, "peft_config"):
            self._stored |= merged(self.llm, self._stored)
            self.llm = self.llm.merge_and_unload()
        tensors = {name: self._stored.get(p, p) for name, p in self.named_parameters()}
        shard_size = options.get("save_pretrained_kwargs", {}).get("max_shard_size", "2GB")
        export_hf(
            # `llm` is the decoder, which POLAR's checkpoints call `model`.
            {f"model.{n[4:]}" if n.startswith("llm.") else n: t for n, t in tensors.items()},
            base=cfg.model.llm.pretrained_model_name_or_path,
            save_dir=Path(save_dir),
            dtype=torch.float32 if fp32 else None,
            max_shard_size=shard_size,
        )


BUILDER.register_module(module=BradleyTerryLoss)
