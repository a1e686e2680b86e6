"""What a DeepSpeed checkpoint holds, by the names of the parameters.

DeepSpeed keeps float32 master weights, and the optimizer's values of the same shapes, in flat
partitions, one file a process. With ZeRO-1 and 2, and in DeepSpeed's bfloat16 optimizer, the
partitions of a group of parameters laid end to end are its parameters laid end to end, so that one
may lie in several. With ZeRO-3 each parameter is cut into as many equal parts as there are
processes, the last ones padded, and a process lays its parts into sub-groups.

A parameter's values are given as *pieces*: flat views of mapped files, which laid end to end are
its elements. Nothing is read but what is cut from them.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polar_xtuner.checkpoint import CheckpointError, load_safely

MODEL_STATES = "*_model_states.pt"
FLAT_ZERO2, FLAT_ZERO3 = "single_partition_of_fp32_groups", "fp32_flat_groups"

Pieces = list[Tensor]
Shapes = Sequence[Mapping[str, torch.Size]]
"""Of the parameters of each group, or sub-group with ZeRO-3, in the order of the partitions."""


class ZeroFolder:
    """A folder that was written with DeepSpeed.

    Raises:
        CheckpointError: it is not one, lacks a process's file, or one asks to run code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not any(path.glob(MODEL_STATES)):
            inside = sorted(entry.name for entry in path.glob("*.pth"))
            advice = f"give one of those in it: {', '.join(inside)}" if inside else (
                "give a .pth file, or the .pth folder of a run with --deepspeed"
            )  # fmt: skip
            raise CheckpointError(
                f"{path} is not a DeepSpeed checkpoint, for it has no {MODEL_STATES}: {advice}"
            )
        self.state = self._model_state(0)
        """What is saved beside the partitions, of the first process."""
        if self.state.get("optimizer") is not None:
            raise CheckpointError(
                f"{path} was written without ZeRO: only folders of ZeRO stage 1, 2 or 3 are read"
            )
        prefix = "bf16_" if any(path.glob("bf16_zero_pp_rank_*_optim_states.pt")) else ""
        name = prefix + "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
        self._files = [path / name.format(rank) for rank in range(self.processes)]
        lacking = [file.name for file in self._files if not file.is_file()]
        if lacking:
            raise CheckpointError(
                f"{path} is not whole: it lacks {', '.join(lacking)}. Each process of the run "
                "wrote a file of its own: copy those of all nodes into one folder"
            )

    @property
    def processes(self) -> int:
        """That the state is cut for."""
        return int(self.state["dp_world_size"])

    @cached_property
    def optimizers(self) -> list[dict[str, Any]]:
        """What the optimizer of every process has saved."""
        return [load_safely(file)["optimizer_state_dict"] for file in self._files]

    @cached_property
    def is_zero3(self) -> bool:
        """Cut as ZeRO-3 does; else as ZeRO-1 and 2 do.

        Raises:
            CheckpointError: as neither.
        """
        found = [key for key in (FLAT_ZERO3, FLAT_ZERO2) if key in self.optimizers[0]]
        if not found or any(found[0] not in optimizer for optimizer in self.optimizers):
            raise CheckpointError(
                f"{self.path} was not written with ZeRO stage 1, 2 or 3: its optimizer states lack "
                f"{(found or [FLAT_ZERO2])[0]}"
            )
        return found[0] == FLAT_ZERO3

    @property
    def shapes(self) -> Shapes:
        return self.state["param_shapes"]

    def master_weights(self) -> dict[str, Pieces]:
        """The float32 weights of all that is trained.

        Raises:
            CheckpointError: the files do not belong together.
        """
        key = FLAT_ZERO3 if self.is_zero3 else FLAT_ZERO2
        return self.by_name([optimizer[key] for optimizer in self.optimizers], "the weights")

    def by_name(self, ranks: Sequence[Sequence[Tensor]], what: str) -> dict[str, Pieces]:
        """What lies as the master weights do: `ranks[rank][group]` is flat.

        Raises:
            CheckpointError: the partitions do not have the size of the parameters.
        """
        join = join_zero3 if self.is_zero3 else join_zero2
        try:
            return join(ranks, self.shapes)
        except Mismatch as error:
            raise CheckpointError(
                f"{self.path} mixes the files of several runs, or {what} are elsewhere (NVMe): "
                f"{error}. Copy it again, all of one run"
            ) from None

    def frozen(self) -> dict[str, tuple[Pieces, torch.Size]]:
        """Parameters that were not trained, if they were saved at all, with their shapes."""
        shapes = self.state["frozen_param_shapes"] or {}
        parts = self.processes if shapes and self.is_zero3 else 1  # else all in the first
        states = [self.state, *(self._model_state(rank) for rank in range(1, parts))]
        flat = {
            name: [s["frozen_param_fragments"][name].reshape(-1) for s in states] for name in shapes
        }
        return {name: (cut(flat[name], 0, shape.numel()), shape) for name, shape in shapes.items()}

    def _model_state(self, rank: int) -> dict[str, Any]:
        """Saved by every process with ZeRO-3, else by the first."""
        files = [self.path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"]
        files += [self.path / "mp_rank_00_model_states.pt"] if rank == 0 else []
        for file in files:
            if file.is_file():
                state: dict[str, Any] = load_safely(file)
                return state
        raise CheckpointError(f"{self.path} is not whole: it lacks {files[0].name}")


class Mismatch(Exception):
    """Partitions do not have the size of the parameters."""


def join_zero2(ranks: Sequence[Sequence[Tensor]], shapes: Shapes) -> dict[str, Pieces]:
    if {len(groups) for groups in ranks} != {len(shapes)}:
        raise Mismatch(f"{len(shapes)} groups of parameters, {[len(g) for g in ranks]} partitions")
    pieces = {}
    for group, shapes_of_group in enumerate(shapes):
        partitions = [rank[group] for rank in ranks]
        start = 0
        for name, shape in shapes_of_group.items():
            pieces[name] = cut(partitions, start, shape.numel())
            start += shape.numel()
        padding = sum(partition.numel() for partition in partitions) - start
        if not 0 <= padding < 2 * len(ranks):  # DeepSpeed pads to a multiple of that
            raise Mismatch(f"its parameters have {start} elements, its partitions {padding} more")
    return pieces


def join_zero3(ranks: Sequence[Sequence[Tensor]], shapes: Shapes) -> dict[str, Pieces]:
    pieces = {}
    start = 0
    for name, shape in (item for of_group in shapes for item in of_group.items()):
        share = -(-shape.numel() // len(ranks))
        padded = [piece for rank in ranks for piece in cut(rank, start, share)]
        pieces[name] = cut(padded, 0, shape.numel())
        start += share
    sizes = {sum(sub_group.numel() for sub_group in rank) for rank in ranks}
    if sizes != {start}:
        raise Mismatch(f"each process should hold {start} elements, they hold {sorted(sizes)}")
    return pieces


def cut(tensors: Sequence[Tensor], start: int, count: int) -> Pieces:
    """Elements [start, start + count) of flat tensors laid end to end, as views of them.

    Raises:
        Mismatch: they end before.
    """
    pieces = []
    for tensor in tensors:
        stop = min(start + count, tensor.numel())
        if start < stop:
            pieces.append(tensor[start:stop])
            count -= stop - start
        start = max(start - tensor.numel(), 0)
    if count:
        raise Mismatch(f"the partitions end {count} elements early")
    return pieces
