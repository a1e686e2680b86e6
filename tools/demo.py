"""The whole way on generated data: rows, training, checkpoint, conversion, scores.

`make demo` runs this. Every stage is checked by what it leaves behind, because `xtuner` exits
with 0 when the run inside it failed. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import load_checkpoint
from transformers import AutoModel
from xtuner.registry import BUILDER

from polar_xtuner.evaluation import wilson_interval
from polar_xtuner.records import Row, read_rows
from polar_xtuner.scoring import PolarScorer
from polar_xtuner.template import Candidate

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "polar_tiny.py"
AUTO_MODEL_BATCH = 64


def stage(title: str, command: list[str], leaves: Path, log: Path) -> float:
    """Run a command until it has left `leaves`; its output goes to `log`. Seconds it took."""
    print(f"* {title} (log: {log}): {' '.join(command)}", flush=True)
    start = time.monotonic()
    bin_dir = Path(sys.executable).parent
    path = f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}"
    # For a model this small a second thread gains nothing, and on a busy machine loses tenfold.
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as out:
        status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env).returncode
    if status or not leaves.exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        sys.exit(f"{tail}\n\n{title} failed: exit status {status}, no {leaves}")
    return time.monotonic() - start


def candidates(rows: list[Row], references: list[str]) -> list[Candidate]:
    """Chosen and rejected of every row, in turn."""
    return [
        Candidate(row.prompt, reference, text, row.wrapper)
        for row, reference in zip(rows, references)
        for text in (*row.chosen, *row.rejected)
    ]


def accuracy(scores: list[float]) -> tuple[float, str]:
    """Of pairs of scores; the number, and the number with its interval."""
    right = sum(chosen > rejected for chosen, rejected in zip(scores[::2], scores[1::2]))
    n = len(scores) // 2
    low, high = wilson_interval(right, n)
    return right / n, f"{right / n:.3f}  [{low:.3f}, {high:.3f}]"


def training_scorer(scorer: PolarScorer, checkpoint: Path, base: Path) -> PolarScorer:
    """`scorer` with the weights of the training model, as its checkpoint holds them."""
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict({"pretrained_model_name_or_path": str(base)})
    model: Any = BUILDER.build(cfg.model)
    load_checkpoint(model, str(checkpoint), map_location="cpu", strict=True)
    scorer.model.model, scorer.model.v_head = model.llm.eval(), model.v_head
    return scorer


@torch.inference_mode()
def auto_model_scores(folder: Path, sequences: list[list[int]]) -> list[float]:
    """Scores by `AutoModel` with the remote code that the folder carries."""
    model = AutoModel.from_pretrained(str(folder), trust_remote_code=True).float().eval()
    scores: list[float] = []
    for start in range(0, len(sequences), AUTO_MODEL_BATCH):
        batch = [torch.tensor(ids) for ids in sequences[start : start + AUTO_MODEL_BATCH]]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(batch):
            mask[row, : len(sequence)] = 1
        out = model(input_ids=ids, attention_mask=mask, use_cache=False)
        scores += out.logits.squeeze(-1).tolist()
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes")
    parser.add_argument("--train", type=int, default=20000, help="training rows")
    parser.add_argument("--held-out", type=int, default=1000, help="held-out rows")
    args = parser.parse_args()
    folder: Path = args.folder
    shutil.rmtree(folder, ignore_errors=True)  # nothing of an earlier run can pass for this one's
    folder.mkdir(parents=True)
    base, work_dir, converted = folder / "base", folder / "work_dir", folder / "hf"

    def python(tool: str, *options: object) -> list[str]:
        return [sys.executable, str(ROOT / "tools" / tool), *map(str, options)]

    settings = [f"pretrained_model_name_or_path={base}"]
    make = python("make_demo.py", folder, "--train", args.train, "--held-out", args.held_out)
    stage("demo data and tiny base model", make, base / "config.json", folder / "make.log")
    train = ["xtuner", "train", str(CONFIG), "--work-dir", str(work_dir), "--cfg-options"]
    train += [*settings, f"data_files={folder / 'train.jsonl'}"]
    marker = work_dir / "last_checkpoint"
    train_seconds = stage("training", train, marker, folder / "train.log")
    checkpoint = Path(marker.read_text().strip())
    convert = ["xtuner", "convert", "pth_to_hf", str(CONFIG), str(checkpoint), str(converted)]
    convert += ["--cfg-options", *settings]
    # The command copies the config last.
    stage("conversion", convert, converted / "xtuner_config.py", folder / "convert.log")

    rows = [row for row in read_rows([folder / "heldout.jsonl"]) if isinstance(row, Row)]
    references = [row.reference for row in rows]
    shuffled = random.Random(0).sample(references, len(references))
    scorer = PolarScorer(str(converted), device="cpu")
    held_out = candidates(rows, references)
    print("* scores of the converted model, through this package and through AutoModel")
    scores = scorer.score(held_out)
    scores_shuffled = scorer.score(candidates(rows, shuffled))
    auto_scores = auto_model_scores(converted, scorer.template.encode(held_out))
    trained = training_scorer(scorer, checkpoint, base).score(held_out)

    def off(others: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(trained, others))

    right, shown = accuracy(scores)
    right_shuffled, shown_shuffled = accuracy(scores_shuffled)
    print(f"\n{'held-out pairs':34}{len(rows)}")
    print(f"{'accuracy [95 % interval]':34}{shown}")
    print(f"{'  with references shuffled':34}{shown_shuffled}")
    print(f"{'converted, off the training model':34}{off(scores):.1e}")
    print(f"{'  through AutoModel':34}{off(auto_scores):.1e}")
    print(f"{'training':34}{train_seconds:.0f} s\n")
    result = {
        "n": len(rows),
        "accuracy": right,
        "accuracy_shuffled_references": right_shuffled,
        "max_score_diff": max(off(scores), off(auto_scores)),
        "train_seconds": round(train_seconds, 1),
    }
    failed = []
    if right < 0.95:
        failed.append(f"accuracy {right:.3f} is below 0.95")
    if right_shuffled > 0.65:
        failed.append(f"accuracy with shuffled references {right_shuffled:.3f} is above 0.65")
    if result["max_score_diff"] > 1e-4:
        failed.append(f"scores differ by {result['max_score_diff']:.1e}, more than 1e-4")
    print(json.dumps(result), flush=True)
    if failed:
        sys.exit("demo failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
