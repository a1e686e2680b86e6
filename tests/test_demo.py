"""`make demo`: its figures, and that it fails when a stage does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from commands import ROOT, TINY, run


def test_the_demo_meets_its_figures(tmp_path: Path) -> None:
    result = run(sys.executable, ROOT / "tools" / "demo.py", "--folder", tmp_path / "demo")
    print(result.stdout)
    assert result.returncode == 0, result.stdout
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["n"] >= 500
    assert figures["accuracy"] >= 0.95
    assert figures["accuracy_shuffled_references"] <= 0.65
    assert figures["max_score_diff"] <= 1e-4
    assert 0 < figures["train_seconds"] < 600


def test_the_demo_fails_when_a_stage_fails(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(f"_base_ = {str(TINY)!r}\nload_from = 'nowhere.pth'\n")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import demo; "
        f"from pathlib import Path; demo.CONFIG = Path({str(broken)!r}); demo.main()"
    )
    result = run(
        *(sys.executable, "-c", code, "--folder", tmp_path / "demo"),
        *("--train", 200, "--held-out", 20),
    )
    assert result.returncode != 0
    assert "training failed" in result.stdout
    assert "nowhere.pth" in result.stdout
