"""Checkpoints of any kind as tensors that stay in their files until they are read.

`xtuner convert pth_to_hf` gets its tensors here (`compat.convert_checkpoints_of_any_kind`) and
`export.py` writes them one at a time, so a conversion holds one tensor, not the model. A file holds
whole tensors, in the dtype they were trained in; a DeepSpeed folder the float32 master weights, in
pieces (`zero_folder.py`). Of a LoRA run, the base model's weights stay in its own files
(`open_model`), and peft merges a layer when it is read (`merged`).

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
from polar_xtuner.zero_folder import Pieces, ZeroFolder

CHUNK = 1 << 24
"""Elements that are copied from a file before its pages are let go."""


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
        CheckpointError: it is missing, damaged or not safe (`checkpoint.check_checkpoint`), or a
            folder of another kind, or one that lacks a file.
        ConversionError: it is a file without weights.
    """
    path = Path(path)
    if path.is_dir():
        ZeroFolder(path)  # which names the files that are lacking
    check_checkpoint(path)
    return {name: _mapped(*stored) for name, stored in open_pieces(path).items()}


def open_pieces(path: Path) -> dict[str, tuple[Pieces, torch.Size]]:
    """`open_checkpoint` of one that was checked, as pieces (`zero_folder.py`) and shapes.

    Of a file, a tensor is one piece, in its shape.
    """
    return _of_folder(ZeroFolder(path)) if path.is_dir() else _of_file(path)


def _of_file(file: Path) -> dict[str, tuple[Pieces, torch.Size]]:
    if file.match("*_states.pt"):
        raise ConversionError(f"{file} is one file of a DeepSpeed checkpoint: give {file.parent}")
    content = load_safely(file)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConversionError(
            f"{file} holds no weights: neither a state_dict nor tensors by name. Give a checkpoint "
            "that `xtuner train` has written"
        )
    return {name: ([tensor], tensor.shape) for name, tensor in state.items()}


def _of_folder(folder: ZeroFolder) -> dict[str, tuple[Pieces, torch.Size]]:
    pieces, state = folder.master_weights(), folder.state
    shapes = {name: shape for of_group in folder.shapes for name, shape in of_group.items()}
    weights = {name: (pieces[name], shape) for name, shape in shapes.items()}
    buffers = {name: state["module"][name] for name in state["buffer_names"]}
    weights |= {name: ([buffer], buffer.shape) for name, buffer in buffers.items()}
    weights |= folder.frozen()
    for name, other in state["shared_params"].items():
        weights[name] = weights[other]
    return weights


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
            tensors = load_safely(file)
            stored |= {name: _mapped([t], t.shape) for name, t in tensors.items()}
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


def _mapped(pieces: Pieces, shape: torch.Size) -> StoredTensor:
    """What consists of views of files mapped by `load_safely`, end to end."""
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
