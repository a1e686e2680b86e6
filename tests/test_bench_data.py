"""`tools/bench_data.py` on a few rows: both sides run, and say what they measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, run_forked

TOOL = ROOT / "tools" / "bench_data.py"


@pytest.mark.parametrize("options", [[], ["--rows", "120", "--only-ours"]])
def test_it_compares_both_sides_on_the_same_rows(
    demo: Any, demo_tokenizer: Any, tmp_path: Path, options: list[str]
) -> None:
    roles = {"prompt": "user"}
    rows = [
        {
            field: [{"role": roles.get(field, "assistant"), "content": f"{field} {number} is 42"}]
            for field in ("prompt", "reference", "chosen", "rejected")
        }
        for number in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    demo_tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [tmp_path / "rows.jsonl"]
    command += ["--tokenizer", tmp_path / "tokenizer", "--json", "--max-packed-length", "512"]
    done = run_forked(TOOL, *command, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    sides = {"ours"} if options else {"ours", "xtuner"}
    for name in ("rows_per_s", "seconds_cached", "peak_rss_mb", "packs", "packs_lower_bound"):
        assert sides <= set(result[name]), name
        assert all(value > 0 for value in result[name].values()), name
    assert result["rows"] == (120 if options else 40)
    assert all(result["packs"][side] >= result["packs_lower_bound"][side] for side in sides)
    if not options:
        assert result["tokens_per_pair"]["ours"] < result["tokens_per_pair"]["xtuner"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    done = run_forked(TOOL, tmp_path / "none.jsonl", "--tokenizer", tmp_path)
    assert done.returncode == 2
    assert f"no such file: {tmp_path / 'none.jsonl'}" in done.stderr
