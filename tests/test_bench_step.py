"""`tools/bench_step.py` on demo rows: the layouts agree, and their sizes are in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, run_forked

ANSWERS = ("It is {n}.", "The answer is {n} in all.", "{n} altogether, I count.")
SMALL = ("--pairs", 9, "--repeats", 1, "--layers", 1, "--hidden-size", 256)


def write_rows(file: Path) -> Path:
    """Five prompts with six pairs of four answers each, one of them given twice."""
    rows = [
        {
            "prompt": f"How much is {n} and {n}, all in all?",
            "reference": f"{n} and {n} is {2 * n}.",
            "chosen": answer.format(n=2 * n),
            "rejected": wrong.format(n=2 * n + 1),
        }
        for n in range(5)
        for answer in ANSWERS
        for wrong in ANSWERS[:2]
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def tokenizer(demo_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    demo_tokenizer.save_pretrained(folder)
    return folder


def bench(tokenizer: Path, *arguments: object) -> Any:
    script = ROOT / "tools" / "bench_step.py"
    return run_forked(script, "--tokenizer", tokenizer, *SMALL, *arguments)


def test_the_layouts_agree_and_share_ever_more(tokenizer: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl")
    # Several packs: losses must not depend on them.
    result = bench(tokenizer, "--json", "--max-packed-length", 600, file, file)
    assert result.returncode == 0, result.stderr
    first, second = (json.loads(x) for x in result.stdout.splitlines() if x.startswith("{"))
    sizes = [f"tokens_{name}" for name in "abcde"]
    assert [first[size] for size in sizes] == [second[size] for size in sizes]
    assert first["file"] == "rows.jsonl"
    assert first["pairs"] == 12, "whole prompts"
    assert first["loss_max_diff"] <= 1e-5
    a, b, c, d, e = (first[size] for size in sizes)
    assert a >= b > c > d
    assert abs(e / d - 1) < 0.1
    assert first["token_ratio_b_d"] == b / d
    for ratio in ("a_d", "b_d", "d_e"):
        over, under = (first[f"seconds_{name}"] for name in ratio.split("_"))
        assert first[f"ratio_{ratio}"] == over / under > 0


def test_without_json_it_prints_a_table_and_names_what_is_wrong(
    tokenizer: Path, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl")
    result = bench(tokenizer, file, tmp_path / "none.jsonl")
    assert "12 pairs of 2 prompts" in result.stdout
    assert "packs, groups share" in result.stdout
    assert result.returncode == 1
    assert "bench_step.py: no such file or folder: " in result.stderr
