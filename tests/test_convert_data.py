"""`tools/convert_data.py --to verl-parquet`: prompt and reference in, verl's columns out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from pyarrow.parquet import ParquetFile, read_table

from polar_xtuner.integrations import verl, verl_data
from polar_xtuner.integrations.verl_data import read_prompts, write_verl_parquet
from polar_xtuner.records import BadRowsError, Row, read_rows

CHAT = [{"role": "user", "content": "6 x 7?"}]


def converted(rows: list[Any], folder: Path, **options: Any) -> list[dict[str, Any]]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_verl_parquet(read_prompts([file]), folder / "out.parquet", **options)
    return read_table(folder / "out.parquet").to_pylist()


def test_a_row_has_the_columns_of_polars_recipe(tmp_path: Path) -> None:
    [row] = converted(
        [{"prompt": CHAT, "reference": "42", "chosen": "42", "rejected": "no", "margin": 1}],
        tmp_path,
        data_source="sums",
        ability="math",
        split="test",
    )
    assert row == {
        "data_source": "sums",
        "prompt": CHAT,
        "ability": "math",
        "reward_model": {
            "style": "polar",
            "ground_truth": [{"role": "assistant", "content": "42"}],
        },
        "extra_info": {
            "split": "test",
            "index": 0,
            "ability": "math",
            "prompt": CHAT,
            "wrapper": "sft",
            "id": None,
        },
    }


def test_texts_become_messages_and_messages_stay(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "Be brief.", "name": "x"},
        *CHAT,
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "And?"},
    ]
    rows = converted(
        [
            {"prompt": "6 x 7?", "reference": [{"content": "42"}], "source": "a", "id": 7},
            {"prompt": talk, "reference": "42", "wrapper": "pretrain", "source": None},
        ],
        tmp_path,
    )
    assert rows[0]["prompt"] == CHAT
    assert rows[0]["reward_model"]["ground_truth"] == [{"role": "assistant", "content": "42"}]
    assert rows[0]["data_source"] == "a"
    assert rows[0]["extra_info"]["id"] == "7"
    assert rows[1]["prompt"] == [{"role": m["role"], "content": m["content"]} for m in talk]
    assert rows[1]["data_source"] == "polar"
    assert rows[1]["extra_info"]["wrapper"] == "pretrain"
    assert rows[1]["extra_info"]["index"] == 1


def test_bad_rows_are_named_as_in_training_and_nothing_is_written(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "reference": "r"},
        {"prompt": "", "reference": "r"},
        {"prompt": "p"},
        {"prompt": [{"content": "p"}, {"role": None, "content": "q"}], "reference": 3},
        {"prompt": [{"content": "p"}], "reference": "r", "output": 17},
    ]
    with pytest.raises(BadRowsError) as raised:
        converted(rows, tmp_path)
    assert [(e.line, e.field) for e in raised.value.errors] == [
        (2, "prompt"),
        (3, "reference"),
        (4, "reference"),
        (5, "prompt[0].role"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert len(converted(rows, tmp_path, on_bad_row="skip")) == 1


def test_rows_are_written_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verl_data, "BATCH", 10)
    rows = converted([{"prompt": str(i), "reference": "r"} for i in range(25)], tmp_path)
    assert [row["extra_info"]["index"] for row in rows] == [*range(25)]
    assert ParquetFile(tmp_path / "out.parquet").metadata.num_row_groups == 3


def test_what_is_written_is_what_the_verl_function_scores(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real rows: the prompt and reference of the scored item have the text of the training row."""
    asked: list[Any] = []

    class Client:
        def __call__(self, items: Any) -> Any:
            from polar_xtuner.rewards import Rewards, Scored, candidate_of

            asked.extend(map(candidate_of, items))
            return Rewards([Scored(0.0)] * len(items))

    monkeypatch.setattr(verl.Settings, "client", lambda self: Client())
    for name in ("gsm8k", "pandalm", "mt_bench", "arena_hard"):
        file, out = shared_data / f"{name}.jsonl", tmp_path / f"{name}.parquet"
        count = write_verl_parquet(read_prompts([file]), out)
        rows = read_table(out).to_pylist()
        read = [row for row in read_rows([file]) if isinstance(row, Row)]
        assert count == len(rows) == len(read)
        verl.compute_score_batch(
            [r["data_source"] for r in rows],
            ["answer"] * len(rows),
            [r["reward_model"]["ground_truth"] for r in rows],
            [r["extra_info"] for r in rows],
            model="m",
        )
        expected = [(r.prompt, r.reference, "answer", r.wrapper) for r in read]
        assert asked == expected
        asked.clear()


def test_the_tool_says_what_it_wrote_and_what_is_bad(tmp_path: Path) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.parquet"
    file.write_text('{"prompt": "p", "reference": "r"}\n{"prompt": "p"}\n')
    command = [sys.executable, str(ROOT / "tools" / "convert_data.py"), str(file)]
    command += ["--to", "verl-parquet", "--output", str(out), "--data-source", "d"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"{file}:2: reference: is missing" in result.stderr
    assert result.stderr.endswith("leave them out with --on-bad-row skip.\n")
    assert not out.exists()
    command += ["--on-bad-row", "skip", "--ability", "a", "--split", "s"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"1 rows in {out}\n"
    [row] = read_table(out).to_pylist()
    assert (row["data_source"], row["ability"]) == ("d", "a")
    assert row["extra_info"]["split"] == "s"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*command, "--json"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 1
    told = result.stderr.splitlines()
    assert told[-1].startswith("convert_data.py: [Errno 28]")
    assert not [line for line in told if "Traceback" in line or "ignored" in line]


def test_no_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row"):
        converted([], tmp_path)
    assert not (tmp_path / "out.parquet").exists()
