"""A config file -> what a check of its data needs: limits, tokenizer, model, how it is trained.

Needs what training needs, for it builds the tokenizer and finds the map function as training does.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import argparse
import difflib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config, ConfigDict, DictAction

from polar_xtuner.data_result import Limits
from polar_xtuner.dataset import PolarDataset, check_options, check_source, map_function
from polar_xtuner.estimates import PUBLISHED, Training
from polar_xtuner.packing import ModelShape
from polar_xtuner.records import MapFn
from polar_xtuner.tokenizer import local_folder

_LENGTHS = ("max_length", "max_response_length")


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
        ValueError: the config is not one of these, its dataset would not take what it says, or the
            model's shape cannot be had.
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
    tokenizer = _named(data, path, "train_dataloader.dataset.tokenizer")
    options = _options(data, path)
    max_packed_length = options["max_packed_length"]
    lora = cfg.model.get("lora")
    return DataSettings(
        data_files=options["data_files"],
        tokenizer=tokenizer,
        template={
            name: options[name] for name in (*_LENGTHS, "separator_token_id", "reward_token_id")
        },
        limits=Limits(
            config=path,
            max_length=options["max_length"],
            max_response_length=options["max_response_length"],
            max_packed_length=max_packed_length,
            accumulative_counts=sampler.get("accumulative_counts", 1),
            pairs_per_step=sampler.get("pairs_per_step"),
            ranks=gpus // size,
            on_bad_row=options["on_bad_row"],
            on_long_group=options["on_long_group"],
        ),
        map_fn=map_function(options["dataset_map_fn"]),
        group_candidates=options["group_candidates"],
        num_proc=options["num_proc"],
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


def _options(data: ConfigDict, path: str) -> dict[str, Any]:
    """All arguments of the dataset by name, with those that the config leaves out."""
    known = inspect.signature(PolarDataset).parameters
    given = {name: value for name, value in data.items() if name != "type"}
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"{path}: PolarDataset has no argument {name!r}"
                + (f": is {close[0]} meant?" if close else f", only {', '.join(known)}")
            )
    options = {name: given.get(name, known[name].default) for name in known}
    if options["data_files"] is not None:  # else rows are given beside the config
        check_source(options["data_files"], options["dataset"])
    check_options(
        options["on_bad_row"],
        options["on_long_group"],
        options["num_proc"],
        **{name: options[name] for name in (*_LENGTHS, "max_packed_length")},
    )
    return options


def _parsed(options: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="check_data.py", usage="--cfg-options NAME=VALUE ...")
    parser.add_argument("--cfg-options", nargs="*", action=DictAction, default={})
    return dict(parser.parse_args(["--cfg-options", *options]).cfg_options)
