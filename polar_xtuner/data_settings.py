"""A config file -> what a check of its data needs: limits, tokenizer, model, how it is trained.

Needs what training needs, for it builds the tokenizer and finds the map function as training does.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config, ConfigDict, DictAction

from polar_xtuner.data_result import Limits
from polar_xtuner.estimates import PUBLISHED, Training
from polar_xtuner.packing import ModelShape
from polar_xtuner.records import MapFn
from polar_xtuner.tokenizer import local_folder


class DataSettings(NamedTuple):
    """What a config says of its data and of the run."""

    data_files: Any
    tokenizer: Any
    """The config of one, for `xtuner.registry.BUILDER`."""
    template: dict[str, Any]
    """Arguments of `PolarTemplate`, but for the tokenizer."""
    limits: Limits
    map_fn: MapFn | None
    group_candidates: bool
    num_proc: int | None
    seed: int
    training: Training


def read_settings(
    path: str, cfg_options: Sequence[str] = (), *, gpus: int = 1, zero: int | None = None
) -> DataSettings:
    """What a config says.

    Args:
        path: of the config.
        cfg_options: `NAME=VALUE`, as `xtuner train` takes them.
        gpus: processes of the run.
        zero: stage of DeepSpeed's ZeRO, None without DeepSpeed.

    Raises:
        ValueError: the config is not one of these, or the model's shape cannot be had.
        OSError: there is no such file.
    """
    try:
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(_parsed(cfg_options))
    except OSError:
        raise
    except Exception as error:  # whatever a user's file raises
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    data = _part(cfg, path, "train_dataloader", "dataset")
    sampler = _part(cfg, path, "train_dataloader", "sampler")
    llm = _part(cfg, path, "model", "llm")
    size = cfg.get("sequence_parallel_size", 1)
    if gpus % size:
        raise ValueError(
            f"{gpus} ranks cannot be divided into groups of sequence_parallel_size={size}"
        )
    shape, vocab_size = model_shape(_named(llm, path, "model.llm.pretrained_model_name_or_path"))
    max_packed_length = data.get("max_packed_length", 32768)
    lora = cfg.model.get("lora")
    return DataSettings(
        data_files=data.get("data_files"),
        tokenizer=_named(data, path, "train_dataloader.dataset.tokenizer"),
        template={
            "max_length": data.get("max_length", 16384),
            "max_response_length": data.get("max_response_length", 4096),
            "separator_token_id": data.get("separator_token_id"),
            "reward_token_id": data.get("reward_token_id"),
        },
        limits=Limits(
            config=path,
            max_length=data.get("max_length", 16384),
            max_response_length=data.get("max_response_length", 4096),
            max_packed_length=max_packed_length,
            accumulative_counts=sampler.get("accumulative_counts", 1),
            pairs_per_step=sampler.get("pairs_per_step"),
            ranks=gpus // size,
            on_bad_row=data.get("on_bad_row", "error"),
            on_long_group=data.get("on_long_group", "error"),
        ),
        map_fn=_map_fn(data),
        group_candidates=data.get("group_candidates", True),
        num_proc=data.get("num_proc"),
        seed=cfg.get("randomness", {}).get("seed") or 0,
        training=Training(
            shape=shape,
            vocab_size=vocab_size,
            max_packed_length=max_packed_length,
            sequence_parallel_size=size,
            ranks=gpus // size,
            epochs=cfg.get("train_cfg", {}).get("max_epochs") or 1,
            checkpointing=cfg.model.get("use_activation_checkpointing", True),
            weight_bytes=2 if "16" in str(llm.get("torch_dtype", "")) else 4,
            autocast=cfg.get("optim_wrapper", {}).get("dtype") is not None,
            lora_rank=None if lora is None else lora.get("r", 8),
            four_bits=llm.get("quantization_config") is not None,
            zero=zero or 0,
        ),
    )


def model_shape(name: str) -> tuple[ModelShape, int]:
    """Shape and vocabulary of a model by its folder or hub name.

    Raises:
        ValueError: it is neither a published model nor a folder or hub name with a `config.json`.
    """
    known = PUBLISHED.get(name.rpartition("/")[2].removesuffix("-Base"))
    if known is not None and not Path(name).is_dir():
        return known
    file = local_folder(name) / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        heads = fields["num_attention_heads"]
        shape = ModelShape(
            fields["num_hidden_layers"],
            fields["hidden_size"],
            fields["intermediate_size"],
            heads,
            fields.get("num_key_value_heads") or heads,
        )
        return shape, fields["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} does not say the model's shape ({error!r}): "
            "set pretrained_model_name_or_path to the base checkpoint"
        ) from error


def _part(cfg: Config, path: str, *names: str) -> ConfigDict:
    part: Any = cfg
    for name in names:
        part = part.get(name)
        if not isinstance(part, dict):
            raise ValueError(f"{path} has no {'.'.join(names)}: give a training config")
    return part


def _named(part: ConfigDict, path: str, name: str) -> Any:
    value = part.get(name.rpartition(".")[2])
    if value is None:
        raise ValueError(f"{path} has no {name}: give a training config")
    return value


def _map_fn(data: ConfigDict) -> MapFn | None:
    from polar_xtuner.dataset import map_function

    return map_function(data.get("dataset_map_fn"))


def _parsed(options: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="check_data.py", usage="--cfg-options NAME=VALUE ...")
    parser.add_argument("--cfg-options", nargs="*", action=DictAction, default={})
    return dict(parser.parse_args(["--cfg-options", *options]).cfg_options)
