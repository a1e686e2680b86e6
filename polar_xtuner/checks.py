"""Whether config, data and model agree: asked before a run costs anything.

`check_settings` needs no model and comes before it is loaded, `check_model` after.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

from dataclasses import fields
from typing import Any

import torch
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper

from polar_xtuner.checkpoint import PolarCheckpointHook
from polar_xtuner.dataset import PolarDataset
from polar_xtuner.modeling_internlm2 import InternLM2Config
from polar_xtuner.optim import PolarOptimWrapper
from polar_xtuner.packing import ModelShape
from polar_xtuner.reward_model import PolarRewardModel
from polar_xtuner.sampler import PackSampler
from polar_xtuner.sequence_parallel import check_heads
from polar_xtuner.template import check_vocabulary


def check_settings(runner: Any, sampler: PackSampler) -> None:
    """Compare what the optimizer, DeepSpeed and the checkpoints take for an optimizer step.

    Raises:
        ValueError: two settings contradict each other; names both.
    """
    planned, deepspeed = sampler.accumulative_counts, deepspeed_config(runner)
    if deepspeed is None:
        optimizer = runner.optim_wrapper
        counts = (
            optimizer.get("accumulative_counts", 1)
            if isinstance(optimizer, dict)
            else optimizer._accumulative_counts
        )
    else:
        counts = deepspeed["gradient_accumulation_steps"]
        _check_deepspeed(deepspeed, runner.cfg.strategy.config)
    if counts != planned:
        raise ValueError(
            f"the optimizer accumulates {counts} packs, the sampler plans for {planned}: set "
            "optim_wrapper.accumulative_counts and train_dataloader.sampler."
            "accumulative_counts to the same number"
        )
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    if not all(isinstance(hook, PolarCheckpointHook) for hook in hooks):
        raise ValueError(
            "mmengine's CheckpointHook leaves half a checkpoint where it is killed: set "
            "default_hooks.checkpoint.type=PolarCheckpointHook"
        )
    for hook in hooks:
        if hook.by_epoch:
            raise ValueError(
                "epochs are no unit of this loop: set default_hooks.checkpoint.by_epoch=False, "
                "and its interval to a number of iterations"
            )
        if "://" in str(hook.out_dir or runner.work_dir):
            raise ValueError(
                f"checkpoints are written to folders, not to {hook.out_dir or runner.work_dir}: "
                "mount it, or copy them there"
            )
    saves = [hook.interval for hook in hooks]
    if any(interval > 0 and interval % planned for interval in saves):
        raise ValueError(
            f"checkpoints every {saves} iterations would split an optimizer step of {planned}: "
            "set default_hooks.checkpoint.interval to a multiple of accumulative_counts"
        )


def _check_deepspeed(config: dict[str, Any], file: dict[str, Any]) -> None:
    """xtuner writes the config's values over those of DeepSpeed's file, with a line in the log."""
    for name, setting in (
        ("gradient_accumulation_steps", "accumulative_counts"),
        ("train_micro_batch_size_per_gpu", "train_dataloader.batch_size"),
        ("gradient_clipping", "optim_wrapper.clip_grad.max_norm"),
    ):
        given = file.get(name, "auto")
        if given not in ("auto", config[name]):
            raise ValueError(
                f"DeepSpeed's file has {name}={given}, the config {setting}={config[name]}: set it "
                "to 'auto' in the file, or both to the same"
            )


def check_model(runner: Any, dataset: PolarDataset) -> None:
    """Compare the data's ids and lengths, and the precision, with the model.

    Raises:
        ValueError: they cannot be trained on together.
    """
    model = polar_model(runner)
    check_data(dataset, model)
    check_heads(model.config.num_attention_heads, model.config.num_key_value_heads)
    dtypes = {p.dtype for p in runner.model.parameters() if p.requires_grad}
    half = dtypes & {torch.float16, torch.bfloat16}
    if isinstance(runner.optim_wrapper, (AmpOptimWrapper, PolarOptimWrapper)) and half:
        raise ValueError(
            f"trained weights are {half.pop()} without a float32 copy, which loses small "
            "updates: set model.llm.torch_dtype to float32, or train with --deepspeed"
        )


def check_data(dataset: PolarDataset, model: PolarRewardModel) -> None:
    """Compare the data's ids and lengths with the model.

    Raises:
        ValueError: the model cannot take them.
    """
    check_vocabulary(dataset.special_ids, model.config.vocab_size)
    scaling = model.config.rope_scaling or {}
    factor = scaling["factor"] if scaling.get("type") == "linear" else 1
    longest = int(factor * model.config.max_position_embeddings)
    if dataset.max_length > longest:
        raise ValueError(
            f"max_length={dataset.max_length} is more than the {longest} positions of the "
            "model (max_position_embeddings): lower max_length"
        )


def deepspeed_config(runner: Any) -> dict[str, Any] | None:
    """What DeepSpeed runs with, None where it does not: then the runner has no such strategy."""
    return getattr(getattr(runner, "strategy", None), "config", None)


def unwrapped(model: Any) -> Any:
    """The model inside DDP or a DeepSpeed engine."""
    if is_model_wrapper(model):
        model = model.module
    elif hasattr(model, "model") and not isinstance(model, PolarRewardModel):
        model = model.model
        model = getattr(model, "module", model)
    return model


def polar_model(runner: Any) -> PolarRewardModel:
    """The model that the runner trains.

    Raises:
        ValueError: it is of another type.
    """
    model = unwrapped(runner.model)
    if not isinstance(model, PolarRewardModel):
        raise ValueError(f"PolarTrainLoop trains a PolarRewardModel, got {type(model).__name__}")
    return model


def shape_of(model: Any) -> ModelShape:
    """Of a model, or of the one that will be built from a config."""
    names = [field.name for field in fields(ModelShape)]
    if isinstance(model, dict):
        llm = model["llm"]
        given = {name: llm[name] for name in names if name in llm}
        config = InternLM2Config.from_pretrained(llm["pretrained_model_name_or_path"], **given)
    else:
        config = unwrapped(model).config
    return ModelShape(**{name: getattr(config, name) for name in names})
