"""Train and convert a tiny model and score real rows with it, in the training environment.

    .venv/bin/python tests/engines/make_model.py DATA FOLDER

DATA holds the real rows and InternLM2's tokenizer. FOLDER gets `hf`, what `xtuner train` and
`xtuner convert` made; `other`, the same with one layer 1 % off, and golden scores of its own; and
`scored.json`: items of real rows, their ids, and the rewards that the training model gives them, as
its checkpoint holds it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from demo import CONFIG, training_scorer  # noqa: E402
from make_demo import write_base  # noqa: E402

from polar_xtuner.export import export_hf  # noqa: E402
from polar_xtuner.rewards import candidate_of  # noqa: E402
from polar_xtuner.scoring import PolarScorer  # noqa: E402
from polar_xtuner.template import REWARD_TOKEN, SEPARATOR_TOKEN  # noqa: E402

TRAIN_ROWS = 240
SCORED_ROWS = {"gsm8k": 220, "pandalm": 60, "mt_bench": 12, "arena_hard": 8}
"""Rows of each file: 300, of which chosen and rejected make 600 items."""

ANSWERS = ("chosen", "rejected")

SHAPE = {"vocab_size": 92560, "num_hidden_layers": 3}
"""Else as in the demo: 128 wide, 4 heads and 2 KV heads of 32, which vLLM's CPU attention needs."""

HEAD_STD = 0.3
"""Of the base's head, so that rewards are some units apart, as those of a trained model."""


def real_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows whose texts no earlier row of the file has."""
    seen: set[str] = set()
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts = {json.dumps([row["prompt"], row["reference"], row[k]]) for k in ANSWERS}
        if len(texts) == len(ANSWERS) and seen.isdisjoint(texts):
            seen |= texts
            yield row


def items_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chosen answers of all rows, then the rejected ones."""
    return [
        {"prompt": row["prompt"], "reference": row["reference"], "output": row[answer]}
        for answer in ANSWERS
        for row in rows
    ]


def write_internlm2_base(folder: Path, data: Path) -> None:
    """A random base model with InternLM2's true tokenizer, `<|reward|>` added to it."""
    tokenizer = LlamaTokenizerFast(
        vocab_file=str(data / "internlm2_tokenizer.model"),
        legacy=False,
        add_prefix_space=False,
        add_bos_token=True,
    )
    special = [SEPARATOR_TOKEN, REWARD_TOKEN]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    write_base(folder, tokenizer, seed=0, **SHAPE)
    weights = torch.load(folder / "pytorch_model.bin")
    weights["v_head.weight"].normal_(std=HEAD_STD)
    torch.save(weights, folder / "pytorch_model.bin")


def write_other(folder: Path, other: Path) -> None:
    """The folder's model with the weights of one decoder layer 1 % off."""
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for name, tensor in tensors.items():
        if name.startswith("model.layers.1."):
            tensor *= 1 + 0.01 * torch.randn_like(tensor)
    export_hf(tensors, str(folder), other)


def xtuner(*command: object, leaves: Path) -> None:
    """Run a command of xtuner, which exits with 0 when it failed: what it leaves tells."""
    binaries = Path(sys.executable).parent
    path = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"
    # For a model this small a second thread gains nothing, and on a busy machine loses tenfold.
    result = subprocess.run(
        [str(binaries / "xtuner"), *map(str, command)],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if not leaves.exists():
        sys.exit(f"{result.stdout[-8000:]}\n\nxtuner {command[0]} has left no {leaves}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    base, work_dir = args.folder / "base", args.folder / "work_dir"
    write_internlm2_base(base, args.data)

    gsm8k = list(real_rows(args.data / "gsm8k.jsonl"))
    rows = gsm8k[-TRAIN_ROWS:]
    (args.folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("--cfg-options", f"pretrained_model_name_or_path={base}")
    xtuner(
        *("train", CONFIG, "--work-dir", work_dir, *settings),
        f"data_files={args.folder / 'train.jsonl'}",
        f"cache_dir={args.folder / 'cache'}",
        *("max_length=2048", "max_response_length=1000", "max_packed_length=4096"),
        leaves=work_dir / "last_checkpoint",
    )
    checkpoint = Path((work_dir / "last_checkpoint").read_text().strip())
    done = args.folder / "hf" / "xtuner_config.py"  # the command copies it last
    xtuner("convert", "pth_to_hf", CONFIG, checkpoint, done.parent, *settings, leaves=done)
    write_other(done.parent, args.folder / "other")

    items = items_of(
        [
            row
            for name, count in SCORED_ROWS.items()
            for row in islice(real_rows(args.data / f"{name}.jsonl"), count)
        ]
    )
    candidates = [candidate_of(item) for item in items]
    scorer = training_scorer(PolarScorer(str(args.folder / "hf"), device="cpu"), checkpoint, base)
    scored = {
        "items": items,
        "ids": scorer.template.encode(candidates),
        "rewards": scorer.score(candidates),
    }
    (args.folder / "scored.json").write_text(json.dumps(scored))


if __name__ == "__main__":
    main()
