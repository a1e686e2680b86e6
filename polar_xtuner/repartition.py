"""A checkpoint's weights and state, as DeepSpeed keeps them in the processes of this run.

DeepSpeed resumes only where each process finds a file that it wrote itself, and takes weights alone
from few of its checkpoints. Here each process cuts its part of the master weights, and of the
optimizer's state, out of the files (`zero_folder.py`), and hands it to DeepSpeed's optimizer as if
it had written it: the same values, bit for bit. Of the files it reads no more than that part.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

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

OF_ALL = ("loss_scaler", "dynamic_loss_scale", "overflow")
"""What every process has saved alike, beside its part."""


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
    before, now = map(_stage, configs)
    is_whole = state.get("optimizer") is not None  # without ZeRO each process has all of it
    is_same = state["dp_world_size"] == processes or is_whole
    if is_same and (before == now or {before, now} == {1, 2}):
        return
    how = (
        f"{path} was written by {state['dp_world_size']} processes at ZeRO stage {before}, now "
        f"there are {processes} at stage {now}"
    )
    advice = "Resume as it was, or start anew from its weights (load_from without resume)"
    if not before or not now:
        raise CheckpointError(f"{how}: only what ZeRO has cut can be cut anew. {advice}")
    if any(map(_is_on_nvme, configs)):
        raise CheckpointError(f"{how}: what is offloaded to NVMe cannot be cut anew. {advice}")
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
        CheckpointError: this run does not use ZeRO, or offloads to NVMe.
    """
    if not _stage(strategy.config) or _is_on_nvme(strategy.config):
        raise CheckpointError(
            f"load_from={path}: weights are taken into ZeRO stage 1, 2 or 3, and not from or to "
            "NVMe. Use pretrained_model_name_or_path with the model that `xtuner convert "
            "pth_to_hf` makes of it"
        )

    def load_checkpoint(*args: Any, **options: Any) -> dict[str, Any]:
        load_weights(strategy.model.model, path)
        return {}

    strategy.load_checkpoint = load_checkpoint


def _stage(config: Mapping[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _is_on_nvme(config: Mapping[str, Any]) -> bool:
    parts = config.get("zero_optimization", {})
    offloads = (parts.get(name) or {} for name in ("offload_optimizer", "offload_param"))
    return any(offload.get("device") == "nvme" for offload in offloads)


def _load_checkpoint(engine: Any, path: Path, *_: Any, **__: Any) -> tuple[str, dict[str, Any]]:
    """`engine.load_checkpoint`, with what it gives: the path, and what the runner has saved."""
    folder = ZeroFolder(path)
    load(engine, folder)
    return str(path), dict(folder.state)


def load(engine: Any, folder: ZeroFolder) -> None:
    """Put weights, optimizer state and counters of a checkpoint into DeepSpeed's engine.

    Args:
        engine: at ZeRO stage 1, 2 or 3, that has not trained yet.

    Raises:
        CheckpointError: the checkpoint is of other parameters, or of an optimizer whose state does
            not have the shapes of the weights.
    """
    layout = _Layout(engine)
    shapes = {name: shape for of_group in folder.shapes for name, shape in of_group.items()}
    layout.check(folder.path, shapes)
    by_key, of_all, groups = _optimizer_state(folder)
    state: dict[int, dict[str, Any]] = {number: dict(of_all) for number in layout.groups}
    for key, values in by_key.items():
        for number, flat in enumerate(layout.part(values)):
            state[number][key] = flat
    groups = [
        {**group, "params": [n for n, of_group in layout.groups.items() if of_group == number]}
        for number, group in enumerate(groups)
    ]
    layout.put(
        layout.part(folder.master_weights()),
        {"state": state, "param_groups": groups},
        {key: folder.optimizers[0][key] for key in OF_ALL},
    )
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, folder.state[counter])


def load_weights(engine: Any, path: Path) -> None:
    """Put the weights of a checkpoint of any kind (`conversion.open_checkpoint`) into an engine.

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
        of_all: Mapping[str, Any] | None = None,
    ) -> None:
        """Hand over what DeepSpeed's optimizer would have saved; without state, weights only."""
        optimizer, is_zero3 = self.optimizer, self.is_zero3
        saved = {
            **(of_all or {key: getattr(optimizer, key) for key in OF_ALL}),
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
    if not all(isinstance(of_rank, dict) and of_rank["state"] for of_rank in saved):
        raise CheckpointError(
            f"{folder.path} has no optimizer state, or one of elastic_checkpoint, which cannot be "
            "cut anew: resume it as it was written"
        )
    state = [of_rank["state"] for of_rank in saved]
    first = state[0][0]
    is_cut = {key: isinstance(value, Tensor) and value.dim() > 0 for key, value in first.items()}
    by_key = {}
    for key in filter(is_cut.get, first):
        values = [[of_rank[number][key] for number in sorted(of_rank)] for of_rank in state]
        by_key[key] = folder.by_name(values)
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
