"""Weights -> a Hugging Face folder that servers know.

The folder is the base checkpoint's with other weights: its `config.json` (with `auto_map`), code
files and tokenizer are copied as they are, so that vLLM, SGLang, LMDeploy and `AutoModel` find
what they expect.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from polar_xtuner.modeling_internlm2 import first_names

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
WEIGHTS = ("*.bin", "*.safetensors", "*.pt", "*.pth", "*.index.json")


def export_hf(
    tensors: Mapping[str, Tensor],
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
        ValueError: a tensor is not finite, or `save_dir` has weights of another export.
    """
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"not exported: tensors with NaN or infinity: {first_names(bad)}")
    weights = {n: t.detach().to(dtype or t.dtype).contiguous().cpu() for n, t in tensors.items()}
    plan = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_size)
    new = {*plan.filename_to_tensors, *([INDEX] if plan.is_sharded else [])}
    old = sorted({file.name for pattern in WEIGHTS for file in save_dir.glob(pattern)} - new)
    if old:
        raise ValueError(
            f"{save_dir} has weights of another export: {', '.join(old[:8])}. They would be loaded "
            "in place of these or beside them: remove them, or choose another folder"
        )
    save_dir.mkdir(parents=True, exist_ok=True)
    _copy_base(base, save_dir)
    for file, names in plan.filename_to_tensors.items():
        save_file({n: weights[n] for n in names}, save_dir / file, metadata={"format": "pt"})
        shutil.copymode(save_dir / "config.json", save_dir / file)  # safetensors writes 0600
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (save_dir / INDEX).write_text(json.dumps(index, indent=2))
    config = json.loads((save_dir / "config.json").read_text())
    config["torch_dtype"] = str(weights["model.norm.weight"].dtype).removeprefix("torch.")
    (save_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    logger.info("wrote %d tensors (%s) to %s", len(weights), config["torch_dtype"], save_dir)


def _copy_base(base: str, save_dir: Path) -> None:
    """Everything of the base checkpoint but its weights."""
    source = Path(base)
    if not source.is_dir():
        source = Path(snapshot_download(base, ignore_patterns=list(WEIGHTS)))
    for file in source.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in WEIGHTS):
            shutil.copyfile(file, save_dir / file.name)
