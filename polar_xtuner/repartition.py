"""A checkpoint's weights and state, as DeepSpeed keeps them in the processes of this run.

DeepSpeed resumes only where each process finds a file that it wrote itself, and takes weights alone
from few of its checkpoints. Here each process cuts its part of the master weights, and of the
optimizer's state, out of the files (`zero_folder.py`), and hands it to DeepSpeed's optimizer as if
it had written it: the same values, bit for bit. Of the files it reads no more than that part.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polar_xtuner.checkpoint import CheckpointError, load_meta
from polar_xtuner.conversion import open_pieces
from polar_xtuner.modeling_internlm2 import first_names
from polar_xtuner.zero_folder import FLAT_ZERO2, FLAT_ZERO3, Pieces, Shapes, ZeroFolder, cut

logger = logging.getLogger(__name__)

LOSS_SCALE = ("loss_scaler", "dynamic_loss_scale", "overflow")
"""Of training in float16, the same in every process."""

CUT_BY = (
    ("zero_optimization", "stage"),
    ("zero_optimization", "round_robin_gradients"),
    ("zero_optimization", "sub_group_size"),
    ("bf16", "enabled"),
    ("fp16", "enabled"),
    ("data_types", "grad_accum_dtype"),
)
"""Settings of DeepSpeed that decide what a process holds, beside the number of processes."""

OF_RUNS = ("meta", "message_hub", "param_schedulers", "optim_wrapper")
"""What mmengine's runner has added to a checkpoint."""


def prepare_resume(strategy: Any, path: Path, processes: int) -> None:
    """Have mmengine's DeepSpeed strategy, before it has its model, resume from any such folder.

    Does nothing where DeepSpeed can resume from it itself.

    Args:
        processes: that there are now.

    Raises:
        CheckpointError: it lacks files, or it or this run keeps its state in a way that cannot be
            cut anew.
    """
    state = load_meta(path)
    configs = (state.get("ds_config") or {}, strategy.config)
    (before, now), *others = ([_setting(c, *name) for c in configs] for name in CUT_BY)
    in_all = state.get("optimizer") is not None  # without ZeRO each process has all of it
    is_cut_so = in_all or state["dp_world_size"] == processes
    if is_cut_so and before == now and all(one == other for one, other in others):
        return
    how = (
        f"{path} was written by {state['dp_world_size']} processes at ZeRO stage {before or 0}, "
        f"now there are {processes} at stage {now or 0}, or other settings of DeepSpeed"
    )
    reasons = [] if before and now else ["only what ZeRO has cut can be cut anew"]
    for config in configs:
        reasons += [f"{what} cannot be cut anew" for what in _fixed(config)]
    if reasons:
        raise CheckpointError(
            f"{how}: {reasons[0]}. Resume as it was, or start anew from its weights (load_from "
            "without resume)"
        )
    ZeroFolder(path)  # lest it be found to lack files when the model is loaded
    logger.info("%s: each cuts its part of the state anew", how)
    resume = strategy.resume

    def resume_repartitioned(filename: str, **options: Any) -> Any:
        wrapper = strategy.model  # looks up what it lacks in DeepSpeed's engine
        wrapper.load_checkpoint = partial(_load_checkpoint, wrapper.model, path)
        try:
            return resume(filename, **options)
        finally:
            del wrapper.load_checkpoint

    strategy.resume = resume_repartitioned


def prepare_weights(strategy: Any, path: Path) -> None:
    """Have mmengine's DeepSpeed strategy take its weights alone from a checkpoint of any kind.

    Raises:
        CheckpointError: this run does not use ZeRO, or cuts in a way that is not known here.
    """
    fixed = _fixed(strategy.config)
    if fixed or not _setting(strategy.config, *CUT_BY[0]):
        raise CheckpointError(
            f"load_from={path}: weights are taken into ZeRO stage 1, 2 or 3"
            f"{''.join(f', not with {what}' for what in fixed)}. Give as "
            "pretrained_model_name_or_path the model that `xtuner convert pth_to_hf` makes of it"
        )

    def load_checkpoint(*args: Any, **options: Any) -> dict[str, Any]:
        take_weights(strategy.model.model, path)
        return {}

    strategy.load_checkpoint = load_checkpoint


def _setting(config: Mapping[str, Any], part: str, name: str) -> Any:
    """None stands for what is not set or is off."""
    return (config.get(part) or {}).get(name) or None


def _fixed(config: Mapping[str, Any]) -> list[str]:
    """What of a DeepSpeed file binds the state to where it lies."""
    zero = config.get("zero_optimization") or {}
    offloads = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    is_fixed = {
        "what is offloaded to NVMe": any(offload.get("device") == "nvme" for offload in offloads),
        "what is saved with elastic_checkpoint": zero.get("elastic_checkpoint"),
        "what MiCS cuts": (zero.get("mics_shard_size") or 0) > 0,
        "what DeepSpeed's BF16_Optimizer holds (grad_accum_dtype)": (
            zero.get("stage") == 1
            and _setting(config, "bf16", "enabled")
            and _setting(config, "data_types", "grad_accum_dtype") == "fp32"
        ),
    }
    return [what for what, is_so in is_fixed.items() if is_so]


def _load_checkpoint(engine: Any, path: Path, *_: Any, **__: Any) -> tuple[str, dict[str, Any]]:
    """`engine.load_checkpoint`, with what it gives: the path, and what the runner has saved."""
    folder = ZeroFolder(path)
    take_up(engine, folder)
    of_run = {key: folder.state[key] for key in OF_RUNS if key in folder.state}
    return str(path), copy.deepcopy(of_run)  # for a tensor of it would keep a whole file mapped


def take_up(engine: Any, folder: ZeroFolder) -> None:
    """Put weights, optimizer state and counters of a checkpoint into DeepSpeed's engine.

    Args:
        engine: at ZeRO stage 1, 2 or 3, that has not trained yet.

    Raises:
        CheckpointError: the checkpoint is of other parameters, or of an optimizer whose state does
            not have the shapes of the weights, or of other groups.
    """
    layout = _Layout(engine)
    shapes = {name: shape for of_group in folder.shapes for name, shape in of_group.items()}
    layout.check(folder.path, shapes)
    by_key, of_all, groups = _optimizer_state(folder)
    there = len(engine.optimizer.optimizer.param_groups)
    if len(groups) != there:
        raise CheckpointError(
            f"{folder.path} is of another optimizer, of {len(groups)} groups of parameters, now "
            f"there are {there}: undo the change of optim_wrapper (paramwise_cfg)"
        )
    # Each a tensor of its own, for it is counted up in each, and none that keeps a file mapped.
    state: dict[int, dict[str, Any]] = {number: copy.deepcopy(of_all) for number in layout.groups}
    for key, values in by_key.items():
        for number, flat in enumerate(layout.part(values)):
            state[number][key] = flat
    groups = [
        {**group, "params": [n for n, of_group in layout.groups.items() if of_group == number]}
        for number, group in enumerate(groups)
    ]
    saved = folder.optimizers[0]
    has_scale = engine.fp16_enabled() and _setting(folder.state["ds_config"], "fp16", "enabled")
    layout.put(
        layout.part(folder.master_weights()),
        {"state": state, "param_groups": groups},
        {key: saved[key] for key in LOSS_SCALE} if has_scale else None,
    )
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, folder.state[counter])


def take_weights(engine: Any, path: Path) -> None:
    """Put the weights of a checkpoint of any kind (`conversion.open_checkpoint`) into an engine.

    It was checked when the run began (`resume.find_checkpoint`), by all ranks together.

    Raises:
        CheckpointError, ConversionError: it cannot be read, or is of another model.
    """
    layout = _Layout(engine)
    stored = open_pieces(path)
    layout.check(path, {name: shape for name, (_, shape) in stored.items()})
    flat = {name: [piece.detach().reshape(-1) for piece in of] for name, (of, _) in stored.items()}
    layout.put(layout.part(flat))


class _Layout:
    """What a process holds of the parameters that DeepSpeed's engine trains."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer
        self.is_zero3 = engine.zero_optimization_stage() == 3
        self.rank = torch.distributed.get_rank(self.optimizer.dp_process_group)
        self.ranks = torch.distributed.get_world_size(self.optimizer.dp_process_group)
        self.shapes: Shapes = engine._get_zero_param_shapes()
        numbers = range(len(self.shapes))
        self.groups: dict[int, int] = (
            self.optimizer.sub_group_to_group_id if self.is_zero3 else dict(zip(numbers, numbers))
        )
        """The optimizer's group of each flat tensor: of each sub-group with ZeRO-3."""

    def check(self, path: Path, before: Mapping[str, torch.Size]) -> None:
        """Raise CheckpointError unless these are the parameters."""
        now = {name: shape for of_group in self.shapes for name, shape in of_group.items()}
        other = sorted(name for name in before.keys() | now if before.get(name) != now.get(name))
        if other:
            raise CheckpointError(
                f"{path} is of another model: {len(other)} trained tensors are in one of the two "
                f"only, or of other shapes: {first_names(other)}"
            )

    def part(self, values: Mapping[str, Pieces]) -> list[Tensor]:
        """The flat tensors of this process."""
        of_groups = [[values[name] for name in names] for names in self.shapes]
        if self.is_zero3:
            return [part_of_zero3(of_group, self.rank, self.ranks) for of_group in of_groups]
        sizes = [flat.numel() for flat in self.optimizer.single_partition_of_fp32_groups]
        return [part_of_zero2(*of_group, self.rank) for of_group in zip(of_groups, sizes)]

    def put(
        self,
        weights: list[Tensor],
        state: dict[str, Any] | None = None,
        loss_scale: Mapping[str, Any] | None = None,
    ) -> None:
        """Hand over what DeepSpeed's optimizer would have saved; without state, weights only.

        Without `loss_scale` it keeps its own.
        """
        optimizer, is_zero3 = self.optimizer, self.is_zero3
        saved = {
            **(loss_scale or {key: getattr(optimizer, key) for key in LOSS_SCALE}),
            "ds_version": version("deepspeed"),
            (FLAT_ZERO3 if is_zero3 else FLAT_ZERO2): weights,
            (OF_ZERO3 if is_zero3 else OF_ZERO2): state or {},
        }
        options = {"load_optimizer_states": bool(state), "load_from_fp32_weights": True}
        if is_zero3:
            optimizer.checkpoint_event_prologue()
        optimizer.load_state_dict([saved] * self.ranks, **options)
        if is_zero3:
            optimizer.checkpoint_event_epilogue()
        else:
            optimizer.update_lp_params()


OF_ZERO2, OF_ZERO3 = "base_optimizer_state", "optimizer_state_dict"


def _optimizer_state(
    folder: ZeroFolder,
) -> tuple[dict[str, dict[str, Pieces]], dict[str, Any], list[dict[str, Any]]]:
    """What torch's optimizer has saved, by key: what is cut, by name; the rest; its groups."""
    saved = [
        optimizer[OF_ZERO3 if folder.is_zero3 else OF_ZERO2] for optimizer in folder.optimizers
    ]
    if not all(of_rank["state"] for of_rank in saved):
        raise CheckpointError(f"{folder.path} has no optimizer state: it cannot be resumed")
    state = [of_rank["state"] for of_rank in saved]
    first = state[0][0]
    is_cut = {key: isinstance(value, Tensor) and value.dim() > 0 for key, value in first.items()}
    by_key = {}
    for key in filter(is_cut.get, first):
        values = [[of_rank[number][key] for number in sorted(of_rank)] for of_rank in state]
        by_key[key] = folder.by_name(values, f"the optimizer's {key}")
    return by_key, {key: first[key] for key in first if not is_cut[key]}, saved[0]["param_groups"]


def part_of_zero2(parameters: Sequence[Pieces], size: int, rank: int) -> Tensor:
    """(size): what a process holds of a group at ZeRO stage 1 or 2, padded with zeros.

    Args:
        parameters: of the group, in DeepSpeed's order.
        size: of each process's part.
    """
    flat = [piece for pieces in parameters for piece in pieces]
    elements = sum(piece.numel() for piece in flat)
    start = min(rank * size, elements)
    return _laid([(cut(flat, start, min(size, elements - start)), size)])


def part_of_zero3(parameters: Sequence[Pieces], rank: int, ranks: int) -> Tensor:
    """(sum of ceil(elements / ranks)): what a process holds of a sub-group with ZeRO-3."""
    parts = []
    for pieces in parameters:
        elements = sum(piece.numel() for piece in pieces)
        share = -(-elements // ranks)
        start = min(rank * share, elements)
        parts.append((cut(pieces, start, min(share, elements - start)), share))
    return _laid(parts)


def _laid(parts: Sequence[tuple[Pieces, int]]) -> Tensor:
    """Pieces end to end in memory, those of each part padded with zeros to its size."""
    flat = torch.zeros(sum(size for _, size in parts))
    end = 0
    for pieces, size in parts:
        start, end = end, end + size
        for piece in pieces:
            flat[start : start + piece.numel()].copy_(piece)
            start += piece.numel()
    return flat
