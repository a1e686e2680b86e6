"""Peak memory of `xtuner convert pth_to_hf`, for each kind of checkpoint.

    python tools/bench_convert.py [--layers 13] [--kinds file zero2 ...] [--json]

Makes a random InternLM2 reward model (by default of 1.0e9 parameters, 4 GB in float32), writes it
as a checkpoint of each kind in turn, converts that by the command that users type, and compares the
result with the model bit by bit. A `file` holds the weights and AdamW's two moments; `zero1`,
`zero2` and `zero3` are folders as DeepSpeed lays them out, of `--processes` partitions with their
moments, the weights of ZeRO-1 and 2 once more beside them; `lora` is a file of adapters of rank 16,
and the base model is float16, as published (no comparison: the result is a sum).

`peak` is the most memory that the converting process had resident (VmHWM: Linux only), pages of
mapped files included; `anonymous` the most that was its own (RssAnon, looked at 50 times a second);
both over the size of the model written. The bound is 1.3. Needs disk for five times the model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

KINDS = ("file", "zero1", "zero2", "zero3", "lora")
BOUND = 1.3
GIGABYTE = 10**9

CONFIG = """
custom_imports = dict(imports=["polar_xtuner.engine"])
model = dict(
    type="PolarRewardModel",
    llm=dict(
        type="polar_xtuner.modeling_internlm2.InternLM2ForRewardModel.from_pretrained",
        pretrained_model_name_or_path={base!r},
        torch_dtype="torch.float32",
    ),
    lora={lora!r},
)
"""
LORA = {"type": "peft.LoraConfig", "r": 16, "lora_alpha": 32, "target_modules": None}


def main() -> None:
    args = parse_args()
    fields = shape_of(args)
    torch.manual_seed(0)
    weights = random_weights(fields)
    size = sum(tensor.nbytes for tensor in weights.values())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        base = Path(folder, "base")
        write_base(base, fields, weights)
        for kind in args.kinds:
            result = {"kind": kind, "parameters": size // 4, "model_gb": round(size / GIGABYTE, 3)}
            result |= measure(kind, weights, base, Path(folder), args.processes)
            result["peak_ratio"] = round(result["peak_gb"] * GIGABYTE / size, 3)
            result["anonymous_ratio"] = round(result["anonymous_gb"] * GIGABYTE / size, 3)
            result["bound"] = BOUND
            print(json.dumps(result) if args.json else line_of(result), flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--vocab-size", type=int, default=92544)
    parser.add_argument("--processes", type=int, default=2, help="partitions of a ZeRO folder")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's")
    parser.add_argument("--json", action="store_true", help="one JSON object a kind")
    return parser.parse_args()


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `config.json`: POLAR-1_8B's proportions."""
    heads = max(2, args.hidden_size // 128)
    return {
        "model_type": "internlm2",
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": 4 * args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "bias": False,
    }


def random_weights(fields: dict[str, Any]) -> dict[str, Tensor]:
    """Float32 tensors by the names of a POLAR checkpoint."""
    from polar_xtuner.modeling_internlm2 import InternLM2Config, InternLM2ForRewardModel

    with torch.device("meta"):
        model = InternLM2ForRewardModel(InternLM2Config(**fields))
    return {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}


def write_base(folder: Path, fields: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """The published layout: float16, `.bin` files of 2 GB."""
    from huggingface_hub import split_torch_state_dict_into_shards

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    halves = {name: tensor.half() for name, tensor in weights.items()}
    plan = split_torch_state_dict_into_shards(
        halves, filename_pattern="pytorch_model{suffix}.bin", max_shard_size="2GB"
    )
    for file, names in plan.filename_to_tensors.items():
        torch.save({name: halves[name] for name in names}, folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


# ---- Checkpoints


def own_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of the model that is trained."""
    return {name.replace("model.", "llm.", 1): tensor for name, tensor in weights.items()}


def write_file(path: Path, weights: dict[str, Tensor]) -> None:
    """As mmengine: weights, and AdamW's moments of the trained ones."""
    moments = {
        number: {"exp_avg": torch.zeros(t.shape), "exp_avg_sq": torch.zeros(t.shape)}
        for number, t in enumerate(weights.values())
    }
    torch.save({"state_dict": weights, "optimizer": {"state": moments}, "meta": {"iter": 1}}, path)


def write_zero(folder: Path, groups: list[dict[str, Tensor]], stage: int, processes: int) -> None:
    """As DeepSpeed 0.16.2 in a run of so many processes, for groups of parameters."""
    folder.mkdir()
    shapes = [OrderedDict((n, t.shape) for n, t in group.items()) for group in groups]
    for rank in range(processes):
        if stage == 3:
            parts = [part_of_each(group, rank, processes) for group in groups]
            optimizer: dict[str, Any] = {"fp32_flat_groups": parts, "partition_count": processes}
        else:
            parts = [part_of_all(group, rank, processes) for group in groups]
            optimizer = {
                "single_partition_of_fp32_groups": parts,
                "partition_count": [processes] * len(groups),
            }
        optimizer["zero_stage"] = stage
        moments = [{m: torch.zeros(p.shape) for m in ("exp_avg", "exp_avg_sq")} for p in parts]
        optimizer["base_optimizer_state"] = {"state": dict(enumerate(moments))}
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": optimizer}, folder / f"{name}_optim_states.pt")
        if stage == 3 or rank == 0:
            module = {n: torch.empty(0) if stage == 3 else t for g in groups for n, t in g.items()}
            state = {
                "module": module,
                "buffer_names": [],
                "param_shapes": shapes,
                "frozen_param_shapes": None,
                "frozen_param_fragments": None,
                "shared_params": {},
                "dp_world_size": processes,
                "ds_version": "0.16.2",
            }
            file = f"{name if stage == 3 else 'mp_rank_00'}_model_states.pt"
            torch.save(state, folder / file)


def part_of_each(group: dict[str, Tensor], rank: int, processes: int) -> Tensor:
    """ZeRO-3: every parameter is cut into equal parts, the last ones padded."""
    parts = []
    for tensor in group.values():
        share = math.ceil(tensor.numel() / processes)
        part = tensor.reshape(-1)[rank * share : (rank + 1) * share]
        parts += [part, part.new_zeros(share - part.numel())]
    return torch.cat(parts)


def part_of_all(group: dict[str, Tensor], rank: int, processes: int) -> Tensor:
    """ZeRO-1 and 2: the parameters end to end, padded, are cut into equal parts."""
    total = sum(tensor.numel() for tensor in group.values())
    share = 2 * math.ceil(total / (2 * processes))
    parts, start, end = [], rank * share, (rank + 1) * share
    for tensor in group.values():
        parts.append(tensor.reshape(-1)[max(start, 0) : max(end, 0)])
        start, end = start - tensor.numel(), end - tensor.numel()
    parts.append(torch.zeros(share - sum(part.numel() for part in parts)))
    return torch.cat(parts)


def adapters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A trained LoRA checkpoint: two small matrices for each large one, and the head."""
    trained = {"v_head.weight": weights["v_head.weight"]}
    for name, tensor in own_names(weights).items():
        if name.startswith("llm.layers") and tensor.dim() == 2:
            stem = "llm.base_model.model." + name.removeprefix("llm.").removesuffix(".weight")
            trained[f"{stem}.lora_A.default.weight"] = torch.randn(LORA["r"], tensor.shape[1])
            trained[f"{stem}.lora_B.default.weight"] = torch.randn(tensor.shape[0], LORA["r"])
    return trained


# ---- Measuring


def measure(
    kind: str, weights: dict[str, Tensor], base: Path, folder: Path, processes: int
) -> dict[str, Any]:
    checkpoint, out, config = (folder / name for name in ("iter_1.pth", "hf", "config.py"))
    config.write_text(CONFIG.format(base=str(base), lora=LORA if kind == "lora" else None))
    if kind == "lora":
        write_file(checkpoint, adapters(weights))
    elif kind == "file":
        write_file(checkpoint, own_names(weights))
    else:
        write_zero(checkpoint, [own_names(weights)], int(kind[-1]), processes)
    start = time.perf_counter()
    peak, anonymous, output = run(
        [str(Path(sys.executable).with_name("xtuner")), "convert", "pth_to_hf"]
        + [str(path) for path in (config, checkpoint, out)]
    )
    seconds = time.perf_counter() - start
    if not (out / "config.json").exists():
        raise SystemExit(f"the conversion of {kind} failed:\n{output[-3000:]}")
    result = {
        "peak_gb": round(peak / GIGABYTE, 3),
        "anonymous_gb": round(anonymous / GIGABYTE, 3),
        "seconds": round(seconds, 1),
    }
    if kind != "lora":
        result["exact"] = is_exact(out, weights)
    shutil.rmtree(out)
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink()
    return result


def run(command: list[str]) -> tuple[int, int, str]:
    """Peak and peak anonymous memory of the largest process of a command; what it printed."""
    import psutil

    peak = anonymous = 0
    with tempfile.TemporaryFile("w+") as output:
        folder = Path(sys.executable).parent  # `xtuner` starts the `python` that PATH finds
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        )
        while process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                try:
                    status = Path(f"/proc/{child.pid}/status").read_text()
                except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
                    continue
                lines = dict(line.split(":", 1) for line in status.splitlines())
                if "VmHWM" in lines:  # a process that ends has none
                    peak = max(peak, 1024 * int(lines["VmHWM"].split()[0]))
                    anonymous = max(anonymous, 1024 * int(lines["RssAnon"].split()[0]))
            time.sleep(0.02)
        output.seek(0)
        return peak, anonymous, output.read()


def is_exact(folder: Path, weights: dict[str, Tensor]) -> bool:
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118
                found.add(name)
                if not torch.equal(content.get_tensor(name), weights[name]):
                    return False
    return found == weights.keys()


def line_of(result: dict[str, Any]) -> str:
    return (
        f"{result['kind']:<6} {result['model_gb']:8.3f} GB   "
        f"peak {result['peak_ratio']:6.3f}x ({result['peak_gb']:.3f} GB)   "
        f"anonymous {result['anonymous_ratio']:6.3f}x   bound {BOUND}x   "
        f"{result['seconds']:6.1f} s   exact {result.get('exact', '-')}"
    )


if __name__ == "__main__":
    main()
