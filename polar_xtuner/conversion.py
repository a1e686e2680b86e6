"""Checkpoints of any kind as tensors that stay in their files until they are read.

`xtuner convert pth_to_hf` gets its tensors here (`compat.convert_checkpoints_of_any_kind`) and
`export.py` writes them one at a time, so a conversion holds one tensor, not the model. A file holds
whole tensors, in the dtype they were trained in. A DeepSpeed folder holds the float32 master
weights in flat partitions, one file a process: with ZeRO-1 and 2 the partitions laid end to end are
the parameters laid end to end, so a parameter may lie in several; with ZeRO-3 each parameter is cut
into as many equal parts as there are processes, the last ones padded. Of a LoRA run, the base
model's weights stay in its own files (`open_model`), and peft merges a layer when it is read
(`merged`).

Files are mapped, and the pages of what has been read are let go: without, the resident memory grows
to the size of all weights. The optimizer's moments are looked at once, for their checksums.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import copy
import ctypes
import mmap
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from polar_xtuner.checkpoint import check_checkpoint, load_safely
from polar_xtuner.modeling_internlm2 import HEAD, InternLM2Config, InternLM2ForRewardModel

CHUNK = 1 << 24
"""Elements that are copied from a file before its pages are let go."""

MODEL_STATES = "*_model_states.pt"


class ConversionError(ValueError):
    """A checkpoint cannot be converted, or a model not be written."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose values come from elsewhere, mostly a checkpoint's files, when it is read.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor that `read` gives.
        source: gives the values in a dtype: on the CPU, contiguous, in any shape.
    """

    shape: torch.Size
    dtype: torch.dtype
    source: Callable[[torch.dtype], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        """A tensor in memory."""
        values = tensor.detach()
        return cls(tensor.shape, tensor.dtype, lambda dtype: values.to("cpu", dtype).contiguous())

    def to(self, dtype: torch.dtype) -> StoredTensor:
        return replace(self, dtype=dtype)

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """(shape): the values on the CPU, contiguous; a copy of what lies in files."""
        return self.source(self.dtype).view(self.shape)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read into memory; see `open_checkpoint`."""
    return {name: stored.read() for name, stored in open_checkpoint(path).items()}


def open_checkpoint(path: str | Path) -> dict[str, StoredTensor]:
    """The weights of a checkpoint by name, in the precision they were trained in.

    Args:
        path: a file of mmengine or of tensors alone, or a folder that DeepSpeed wrote with ZeRO
            stage 1, 2 or 3: then the weights are its float32 master weights. Of a LoRA run, either
            holds the adapters and the head.

    Raises:
        CheckpointError: it is missing, damaged or not safe (`checkpoint.check_checkpoint`).
        ConversionError: it is not a checkpoint of these kinds, or lacks a file.
    """
    path = Path(path)
    if path.is_dir():
        _check_files(path)
    check_checkpoint(path)
    return _of_folder(path) if path.is_dir() else _of_file(path)


def _of_file(file: Path) -> dict[str, StoredTensor]:
    if file.match("*_states.pt"):
        raise ConversionError(f"{file} is one file of a DeepSpeed checkpoint: give {file.parent}")
    content = load_safely(file)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConversionError(
            f"{file} holds no weights: neither a state_dict nor tensors by name. Give a checkpoint "
            "that `xtuner train` has written"
        )
    return {name: _mapped([tensor]) for name, tensor in state.items()}


# ---- DeepSpeed


def _check_files(folder: Path) -> None:
    """Raise if a process's file is not there; `check_checkpoint` counts, this names them."""
    if not any(folder.glob(MODEL_STATES)):
        inside = sorted(entry.name for entry in folder.glob("*.pth"))
        advice = f"give one of those in it: {', '.join(inside)}" if inside else (
            "give a .pth file, or the .pth folder of a run with --deepspeed"
        )  # fmt: skip
        raise ConversionError(
            f"{folder} is not a DeepSpeed checkpoint, for it has no {MODEL_STATES}: {advice}"
        )
    state = _model_state(folder)
    lacking = [file.name for file in _partition_files(folder, state) if not file.is_file()]
    if lacking:
        raise ConversionError(
            f"{folder} is not whole: it lacks {', '.join(lacking)}. Each process of the run wrote "
            "a file of its own: copy those of all nodes into one folder"
        )


def _model_state(folder: Path, rank: int = 0) -> dict[str, Any]:
    """What is saved beside the partitions: by every process with ZeRO-3, else by the first."""
    files = [folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"]
    files += [folder / "mp_rank_00_model_states.pt"] if rank == 0 else []
    for file in files:
        if file.is_file():
            return load_safely(file)
    raise ConversionError(f"{folder} is not whole: it lacks {files[0].name}")


def _partition_files(folder: Path, state: Mapping[str, Any]) -> list[Path]:
    """The file of every process, in their order, whether it is there or not."""
    prefix = "bf16_" if any(folder.glob("bf16_zero_pp_rank_*_optim_states.pt")) else ""
    name = prefix + "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    return [folder / name.format(rank) for rank in range(state["dp_world_size"])]


def _of_folder(folder: Path) -> dict[str, StoredTensor]:
    state = _model_state(folder)
    optimizers = [
        load_safely(file)["optimizer_state_dict"] for file in _partition_files(folder, state)
    ]
    is_zero3 = "fp32_flat_groups" in optimizers[0]
    key = "fp32_flat_groups" if is_zero3 else "single_partition_of_fp32_groups"
    if any(key not in optimizer for optimizer in optimizers):
        raise ConversionError(
            f"{folder} was not written with ZeRO stage 1, 2 or 3: its optimizer states lack {key}"
        )
    merge = _merge_zero3 if is_zero3 else _merge_zero2
    try:
        weights = merge([optimizer[key] for optimizer in optimizers], state["param_shapes"])
    except _Mismatch as error:
        raise ConversionError(
            f"{folder} mixes the files of several runs: {error}. Copy it again, all of one run"
        ) from None
    weights |= {name: _mapped([state["module"][name]]) for name in state["buffer_names"]}
    weights |= _frozen(folder, state, len(optimizers) if is_zero3 else 1)
    for name, other in state["shared_params"].items():
        weights[name] = weights[other]
    return weights


class _Mismatch(Exception):
    """Partitions do not have the size of the parameters."""


def _merge_zero2(
    ranks: Sequence[Sequence[Tensor]], shapes: Sequence[Mapping[str, torch.Size]]
) -> dict[str, StoredTensor]:
    """Of ZeRO-1 and 2, and of DeepSpeed's bfloat16 optimizer: `ranks[rank][group]` is flat."""
    if {len(groups) for groups in ranks} != {len(shapes)}:
        raise _Mismatch(f"{len(shapes)} groups of parameters, {[len(g) for g in ranks]} partitions")
    weights = {}
    for group, shapes_of_group in enumerate(shapes):
        partitions = [rank[group] for rank in ranks]
        start = 0
        for name, shape in shapes_of_group.items():
            weights[name] = _mapped(_cut(partitions, start, shape.numel()), shape)
            start += shape.numel()
        padding = sum(partition.numel() for partition in partitions) - start
        if not 0 <= padding < 2 * len(ranks):  # DeepSpeed pads to a multiple of that
            raise _Mismatch(f"its parameters have {start} elements, its partitions {padding} more")
    return weights


def _merge_zero3(
    ranks: Sequence[Sequence[Tensor]], shapes: Sequence[Mapping[str, torch.Size]]
) -> dict[str, StoredTensor]:
    """Of ZeRO-3: `ranks[rank]` are flat sub-groups, which a parameter may cross."""
    weights = {}
    start = 0
    for name, shape in (item for of_group in shapes for item in of_group.items()):
        share = -(-shape.numel() // len(ranks))
        padded = [piece for rank in ranks for piece in _cut(rank, start, share)]
        weights[name] = _mapped(_cut(padded, 0, shape.numel()), shape)
        start += share
    sizes = {sum(sub_group.numel() for sub_group in rank) for rank in ranks}
    if sizes != {start}:
        raise _Mismatch(f"each process should hold {start} elements, they hold {sorted(sizes)}")
    return weights


def _frozen(folder: Path, state: Mapping[str, Any], parts: int) -> dict[str, StoredTensor]:
    """Parameters that were not trained, if they were saved at all; whole if `parts` is 1."""
    shapes = state["frozen_param_shapes"] or {}
    if not shapes:
        return {}
    states = [state, *(_model_state(folder, rank) for rank in range(1, parts))]
    return {
        name: _mapped(
            _cut([s["frozen_param_fragments"][name].reshape(-1) for s in states], 0, shape.numel()),
            shape,
        )
        for name, shape in shapes.items()
    }


def _cut(tensors: Sequence[Tensor], start: int, count: int) -> list[Tensor]:
    """Elements [start, start + count) of flat tensors laid end to end, as views of them."""
    pieces = []
    for tensor in tensors:
        stop = min(start + count, tensor.numel())
        if start < stop:
            pieces.append(tensor[start:stop])
            count -= stop - start
        start = max(start - tensor.numel(), 0)
    if count:
        raise _Mismatch(f"the partitions end {count} elements early")
    return pieces


# ---- LoRA: the base model's files

BASE_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where transformers looks for weights, in its order."""

PLAIN_LORA = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_bias"),
    *("fan_in_fan_out", "task_type", "inference_mode", "auto_mapping", "peft_version"),
    *("base_model_name_or_path", "revision"),
}
"""Fields of a `LoraConfig` under which peft adds adapters without a look at the weights."""


def adds_unseen(lora: Any) -> bool:
    """Whether peft can add the adapters of this configuration to a model without values.

    Others may start from the weights (PiSSA, LoftQ), copy layers of the model, and so on.
    """
    if type(lora) is not LoraConfig:
        return False
    default = vars(LoraConfig())
    others = {name for name, value in vars(lora).items() if value != default.get(name)} - PLAIN_LORA
    return not others or (
        others == {"init_lora_weights"} and lora.init_lora_weights in (False, "gaussian")
    )


def open_model(pretrained_model_name_or_path: str, **options: Any) -> InternLM2ForRewardModel:
    """What `from_pretrained` gives, but on the meta device: the values stay in the base's files.

    `stored` of the model has them, by name of the parameter; the reward head's may be missing.
    Where files or options are out of the ordinary, or the base lacks something, this is
    `from_pretrained` itself, which says what is lacking.

    Raises:
        ConversionError: a tensor does not have the shape that `config.json` tells.
    """
    path = pretrained_model_name_or_path
    known = {"trust_remote_code", "low_cpu_mem_usage", *InternLM2Config().to_dict()}
    if options.keys() <= known and options.get("torch_dtype") != "auto":
        model = InternLM2ForRewardModel.empty(path, **options)
        stored = _of_base(path)
        parameters = dict(model.named_parameters())
        shapes = {HEAD: parameters[HEAD].shape, **{name: t.shape for name, t in stored.items()}}
        for name in parameters.keys() & shapes.keys():
            found, shape = tuple(shapes[name]), tuple(parameters[name].shape)
            if found != shape:
                raise ConversionError(f"{path}: {name} has shape {found}, by its config {shape}")
        if parameters.keys() <= shapes.keys():
            model.stored = {n: stored[n].to(p.dtype) for n, p in parameters.items() if n in stored}
            return model
    return InternLM2ForRewardModel.from_pretrained(path, **{**options, "low_cpu_mem_usage": True})


def _of_base(base: str) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face folder or hub name, but those of files that are not mapped."""
    stored: dict[str, StoredTensor] = {}
    found = (cached_file(base, n, _raise_exceptions_for_missing_entries=False) for n in BASE_FILES)
    first = next(filter(None, found), "")
    files = get_checkpoint_shard_files(base, first)[0] if first.endswith(".json") else [first]
    for file in map(Path, filter(None, files)):
        if file.suffix == ".safetensors":
            stored |= _of_safetensors(file)
        elif zipfile.is_zipfile(file):  # else of a torch before 1.6
            stored |= {name: _mapped([tensor]) for name, tensor in load_safely(file).items()}
    return stored


def _of_safetensors(file: Path) -> dict[str, StoredTensor]:
    def read(name: str, dtype: torch.dtype) -> Tensor:
        with safe_open(file, "pt") as content:  # opened for each: what is closed is not resident
            return content.get_tensor(name).to(dtype, copy=True)

    stored = {}
    with safe_open(file, "pt") as content:
        for name in content.keys():  # noqa: SIM118
            tensor = content.get_tensor(name)
            stored[name] = StoredTensor(tensor.shape, tensor.dtype, partial(read, name))
    return stored


def merged(
    llm: nn.Module, stored: Mapping[nn.Parameter, StoredTensor]
) -> dict[nn.Parameter, StoredTensor]:
    """The parameters on the meta device that adapters are added to, as the sums, by peft.

    Args:
        stored: the values of the parameters on the meta device.
    """
    sums = {}
    for layer in llm.modules():
        if isinstance(layer, BaseTunerLayer):
            own = {n: stored.get(p) or StoredTensor.of(p) for n, p in layer.named_parameters()}
            unmerged = copy.deepcopy(layer)  # for peft will mark the layer as merged
            for name, parameter in layer.get_base_layer().named_parameters():
                if parameter.is_meta:
                    source = partial(_merge, unmerged, own, name)
                    sums[parameter] = StoredTensor(parameter.shape, parameter.dtype, source)
    return sums


def _merge(layer: Any, stored: Mapping[str, StoredTensor], name: str, dtype: torch.dtype) -> Tensor:
    layer = copy.deepcopy(layer)
    layer.load_state_dict({name: tensor.read() for name, tensor in stored.items()}, assign=True)
    layer.merge()
    return layer.get_base_layer().get_parameter(name).detach().to(dtype).contiguous()


# ---- Mapped files


def _mapped(pieces: Sequence[Tensor], shape: torch.Size | None = None) -> StoredTensor:
    """What consists of views of files mapped by `load_safely`, end to end."""
    shape = pieces[0].shape if shape is None else shape
    return StoredTensor(shape, pieces[0].dtype, partial(_joined, tuple(pieces)))


def _joined(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    values = torch.empty(sum(piece.numel() for piece in pieces), dtype=dtype)
    done = 0
    for piece in pieces:
        for chunk in piece.detach().reshape(-1).split(CHUNK):
            values[done : done + chunk.numel()].copy_(chunk)
            done += chunk.numel()
            _let_go(chunk)
    return values


def _let_go(values: Tensor) -> None:
    """Take the pages of a mapped file out of memory: read again, they come from the file again.

    Only of a mapping that was never written to: what was written would be lost.
    """
    start = -(-values.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (values.data_ptr() + values.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start and hasattr(mmap, "MADV_DONTNEED"):  # Windows lacks it
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED
        )
