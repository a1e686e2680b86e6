"""The whole way on generated data: rows, training, checkpoint, conversion, evaluation, scores.

`make demo` runs this. Every stage is checked by what it leaves behind, because `xtuner` exits
with 0 when the run inside it failed. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
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


def candidates(file: Path) -> list[Candidate]:
    """Chosen and rejected of every row, in turn."""
    return [
        Candidate(row.prompt, row.reference, text, row.wrapper)
        for row in read_rows([file])
        if isinstance(row, Row)
        for text in (*row.chosen, *row.rejected)
    ]


def evaluated_scores(file: Path) -> list[float]:
    """What `evaluate.py --scores` has written, in the order of `candidates`."""
    lines = map(json.loads, file.read_text().splitlines())
    return [s for line in lines for s in (*line["chosen_scores"], *line["rejected_scores"])]


def shown(figures: dict[str, float]) -> str:
    """The accuracy of pairs with its interval."""
    low, high = figures["accuracy_low"], figures["accuracy_high"]
    return f"{figures['accuracy']:.3f}  [{low:.3f}, {high:.3f}]"


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
    held_out, scores_file = folder / "heldout.jsonl", folder / "scores.jsonl"
    report = folder / "report"

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

    evaluation = python("evaluate.py", converted, held_out, "--controls", "--json")
    evaluation += ["--scores", str(scores_file), "--report", str(report)]
    log = folder / "evaluate.log"
    stage("evaluation", evaluation, report / "index.html", log)
    figures = json.loads(log.read_text().splitlines()[-1])
    right, shuffled = figures["pairs"], figures["shuffled_references"]["pairs"]
    scores = evaluated_scores(scores_file)
    print("* scores of the training model, and of the converted one through AutoModel", flush=True)
    scorer = PolarScorer(str(converted), device="cpu")
    auto_scores = auto_model_scores(converted, scorer.template.encode(candidates(held_out)))
    trained = training_scorer(scorer, checkpoint, base).score(candidates(held_out))

    def off(others: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(trained, others))

    print(f"\n{'held-out pairs':34}{right['pairs']}")
    print(f"{'accuracy [95 % interval]':34}{shown(right)}")
    print(f"{'  with references shuffled':34}{shown(shuffled)}")
    print(f"{'converted, off the training model':34}{off(scores):.1e}")
    print(f"{'  through AutoModel':34}{off(auto_scores):.1e}")
    print(f"{'training':34}{train_seconds:.0f} s")
    print(f"{'report':34}{report / 'index.html'}\n")
    result = {
        "n": right["pairs"],
        "accuracy": right["accuracy"],
        "accuracy_shuffled_references": shuffled["accuracy"],
        "max_score_diff": max(off(scores), off(auto_scores)),
        "train_seconds": round(train_seconds, 1),
    }
    failed = []
    if right["accuracy"] < 0.95:
        failed.append(f"accuracy {right['accuracy']:.3f} is below 0.95")
    if shuffled["accuracy"] > 0.65:
        failed.append(f"accuracy with shuffled references {shuffled['accuracy']:.3f} is above 0.65")
    if result["max_score_diff"] > 1e-4:
        failed.append(f"scores differ by {result['max_score_diff']:.1e}, more than 1e-4")
    print(json.dumps(result), flush=True)
    if failed:
        sys.exit("demo failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
