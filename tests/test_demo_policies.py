"""`tools/demo_policies.py`: a model told policies apart on prompts it has not seen."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from commands import ROOT

from polar_xtuner.records import Row, read_rows


def test_a_model_tells_policies_apart_on_unseen_prompts(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    tool = [sys.executable, ROOT / "tools" / "demo_policies.py", "--folder", folder]
    done = subprocess.run([*map(str, tool), "--json"], capture_output=True, text=True)
    print(done.stderr)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["n"] >= 500
    low, high = figures["accuracy_interval_95"]
    assert figures["accuracy"] >= 0.9 and low < figures["accuracy"] <= high
    assert figures["accuracy_shuffled_references"] <= 0.65
    rows = {
        name: [row for row in read_rows([folder / f"{name}.jsonl"]) if isinstance(row, Row)]
        for name in ("train", "heldout")
    }
    assert {row.prompt for row in rows["train"]}.isdisjoint(row.prompt for row in rows["heldout"])
    assert {row.wrapper for row in rows["train"]} == {"pretrain"}
    sides = random.Random(0).sample(rows["heldout"], 20)
    assert all(row.extra["policy"] != row.extra["rejected_policy"] for row in sides)
