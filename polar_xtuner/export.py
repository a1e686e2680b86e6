"""Weights -> a Hugging Face folder that servers know.

The folder is the base checkpoint's with other weights: its `config.json` (with `auto_map`), code
files and tokenizer are copied as they are, so that vLLM, SGLang, LMDeploy and `AutoModel` find
what they expect. What the weights, as they were written, make of a few rows is put beside them
(`golden_scores`).

Tensors are read, checked and written one at a time. All files are written to `.unfinished` within
the folder and moved to their places at the end, `config.json` last: an export that fails or is
killed leaves nothing that would be loaded as a model.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from torch import Tensor

from polar_xtuner.conversion import ConversionError, StoredTensor
from polar_xtuner.golden import GOLDEN, write_golden
from polar_xtuner.golden_scores import INDEX, golden_scores
from polar_xtuner.modeling_internlm2 import first_names

logger = logging.getLogger(__name__)

CONFIG = "config.json"
UNFINISHED = ".unfinished"
WEIGHTS = ("*.bin", "*.safetensors", "*.pt", "*.pth", "*.index.json")

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""Of a safetensors header: https://github.com/huggingface/safetensors#format."""


def export_hf(
    tensors: Mapping[str, Tensor | StoredTensor],
    base: str,
    save_dir: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "2GB",
) -> None:
    """Write `tensors`, by the names of a POLAR checkpoint, to `save_dir`.

    Args:
        base: folder or hub name of the checkpoint that training started from.
        dtype: of the written tensors; None keeps each one's own.
        max_shard_size: largest file of weights, as "2GB".

    Raises:
        ConversionError: a tensor is not finite as it would be written, `save_dir` has weights of
            another export, or a file cannot be written; `save_dir` is then as it was.
    """
    stored = {
        name: (StoredTensor.of(tensor) if isinstance(tensor, Tensor) else tensor)
        for name, tensor in tensors.items()
    }
    stored = {name: tensor.to(dtype or tensor.dtype) for name, tensor in stored.items()}
    bad = [name for name, tensor in stored.items() if not _is_finite(tensor.read())]
    if bad:
        raise ConversionError(f"not exported: tensors with NaN or infinity: {first_names(bad)}")
    plan = split_state_dict_into_shards_factory(
        stored,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    new = {*plan.filename_to_tensors, *([INDEX] if plan.is_sharded else [])}
    old = sorted({file.name for pattern in WEIGHTS for file in save_dir.glob(pattern)} - new)
    if old:
        raise ConversionError(
            f"{save_dir} has weights of another export: {', '.join(old[:8])}. They would be loaded "
            "in place of these or beside them: remove them, or choose another folder"
        )
    unfinished = save_dir / UNFINISHED
    try:
        if unfinished.exists():
            shutil.rmtree(unfinished)  # of an export that was killed
        unfinished.mkdir(parents=True)
        _copy_base(base, unfinished)
        for file, names in plan.filename_to_tensors.items():
            _write_safetensors(unfinished / file, {name: stored[name] for name in names})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (unfinished / INDEX).write_text(json.dumps(index, indent=2))
        config = json.loads((unfinished / CONFIG).read_text())
        config["torch_dtype"] = str(stored["model.norm.weight"].dtype).removeprefix("torch.")
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        _add_golden_scores(unfinished)
        _move_into_place(unfinished, save_dir)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConversionError(f"no model was written to {save_dir}: {error}") from error
        raise
    logger.info("wrote %d tensors (%s) to %s", len(stored), config["torch_dtype"], save_dir)


def _is_finite(values: Tensor) -> bool:
    # Both are NaN if any value is. `isfinite` of all values would take the memory of three copies.
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def _write_safetensors(file: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """As `safetensors.torch.save_file`, which wants all tensors of a file in memory."""
    names: Sequence[str] = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of 8
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            out.write(tensors[name].read().reshape(-1).view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())  # a network file system reports a full disk only then


def _add_golden_scores(folder: Path) -> None:
    try:
        write_golden(folder, golden_scores(folder))
    except ValueError as error:
        logger.warning("there will be no %s to verify servers with: %s", GOLDEN, error)


def _copy_base(base: str, folder: Path) -> None:
    """Everything of the base checkpoint but its weights and what they have scored."""
    source = Path(base)
    if not source.is_dir():
        source = Path(snapshot_download(base, ignore_patterns=list(WEIGHTS)))
    for file in source.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in (*WEIGHTS, GOLDEN)):
            shutil.copyfile(file, folder / file.name)


def _move_into_place(unfinished: Path, save_dir: Path) -> None:
    (save_dir / CONFIG).unlink(missing_ok=True)  # of an earlier export: without, it is no model
    (save_dir / GOLDEN).unlink(missing_ok=True)
    for file in sorted(unfinished.iterdir(), key=lambda file: file.name == CONFIG):
        file.replace(save_dir / file.name)
    unfinished.rmdir()
