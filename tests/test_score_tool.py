"""`tools/score.py`: rows in, lines out, in process and through a server."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, run_forked
from pyarrow.parquet import read_table

from polar_xtuner.client import RewardModelClient
from polar_xtuner.records import BadRow, Row, map_rows
from polar_xtuner.rewards import Scored
from polar_xtuner.scored_lines import Summary, scored_lines, take_scored, write_parquet
from polar_xtuner.scoring import PolarScorer
from polar_xtuner.template import Candidate

AHEAD = 7


def reward(c: Candidate) -> float:
    return len(c.prompt) + len(c.reference) / 100 + len(c.output) / 1e4


class FakeScorer:
    """Takes a few items ahead, as scorers do; has no reward for the output "bad"."""

    def stream(self, items: Iterable[Candidate]) -> Iterator[Scored]:
        source = iter(items)
        while some := [*islice(source, AHEAD)]:
            for one in some:
                bad = one.output == "bad"
                yield Scored(None, "is bad") if bad else Scored(reward(one))


def rows_of(*raw: Any) -> Iterator[Row | BadRow]:
    return map_rows(raw, "rows", scoring=True)


def lines_of(*raw: Any) -> list[dict[str, Any]]:
    return [*scored_lines(FakeScorer(), rows_of(*raw), "")]


def to_score(output: Any, **fields: Any) -> dict[str, Any]:
    return {"prompt": "p", "reference": "r", "output": output, **fields}


def pair(chosen: Any, rejected: Any, **fields: Any) -> dict[str, Any]:
    return {"prompt": "p", "reference": "r", "chosen": chosen, "rejected": rejected, **fields}


# --- lines ---------------------------------------------------------------------------------------


def test_every_row_gets_its_scores_in_order() -> None:
    one, several, both = lines_of(
        to_score("o", id=3), to_score(["", "oo", "o"]), pair("c", ["xx", "", "yyyy"])
    )
    assert one == {"file": "rows", "line": 1, "id": "3", "key": one["key"], "scores": [1.0101]}
    assert several["scores"] == pytest.approx([1.01, 1.0102, 1.0101])
    assert both["chosen_scores"] == pytest.approx([1.0101])
    assert both["rejected_scores"] == pytest.approx([1.0102, 1.01, 1.0104])
    assert both["line"] == 3 and "scores" not in both


def test_errors_are_kept_and_cost_others_nothing() -> None:
    lines = lines_of(
        17,
        to_score(["o", "bad"]),
        {"prompt": "p", "output": 3},
        to_score("o"),
        pair("bad", "x"),
        {"reference": "r"},
        {"reference": "r"},
    )
    assert [line["line"] for line in lines] == [*range(1, 8)]
    assert ["error" in line for line in lines] == [True, True, True, False, True, True, True]
    assert lines[1]["scores"] == [pytest.approx(1.0101), None]
    assert lines[1]["error"] == "output[1]: is bad"
    assert "reference: is missing; output: must be" in lines[2]["error"]
    assert lines[4]["chosen_scores"] == [None] and lines[4]["rejected_scores"] != [None]
    summary = Summary()
    for line in lines:
        summary.add(line)
    figures = summary.figures()
    assert figures == {"n": 0, "errors": 6, "bad_rows": 4}
    assert summary.first_error.startswith("rows:1: row: must be an object")


@pytest.mark.parametrize("count", [0, 1, AHEAD, 50])
def test_bad_rows_alone_are_lines_too(count: int) -> None:
    assert len(lines_of(*[{}] * count)) == count


def test_accuracy_is_of_all_pairs_and_a_tie_is_not_right() -> None:
    summary = Summary()
    for line in lines_of(
        pair("cc", "x"), pair(["c", "ccc"], ["xx", "x x"]), pair("a", "b"), to_score("o")
    ):
        summary.add(line)
    figures = summary.figures()
    assert (figures["n"], figures["ties"]) == (6, 2)
    assert figures["accuracy"] == pytest.approx(2 / 6)
    low, high = figures["accuracy_interval_95"]
    assert 0 < low < 2 / 6 < high < 1
    assert figures["mean_margin"] == pytest.approx((1 - 1 - 2 + 1 + 0 + 0) / 6 / 1e4)


def test_a_hundred_thousand_rows_stream() -> None:
    read = written = furthest = 0

    def source() -> Iterator[dict[str, Any]]:
        nonlocal read
        for number in range(100_000):
            read += 1
            yield to_score("o" * (number % 5)) if number % 10 else {}

    for line in scored_lines(FakeScorer(), map_rows(source(), "rows", scoring=True), ""):
        written += 1
        assert line["line"] == written
        furthest = max(furthest, read - written)
    assert written == 100_000
    assert furthest <= 2 * AHEAD


# --- resuming ------------------------------------------------------------------------------------


def resumed(raw: list[Any], output: Path, settings: str = "") -> list[dict[str, Any]]:
    """What a resumed run leaves in `output`."""
    rows = rows_of(*raw)
    kept = [*take_scored(FakeScorer(), output, rows, settings)]
    assert [json.loads(line) for line in output.read_text().splitlines()] == kept
    assert not [*output.parent.glob("*.unfinished")]
    with output.open("a") as stream:
        for line in scored_lines(FakeScorer(), rows, settings):
            stream.write(json.dumps(line) + "\n")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines[: len(kept)] == kept
    return lines


def test_a_run_cut_off_at_any_byte_is_continued_to_the_same_end(tmp_path: Path) -> None:
    raw = [to_score("a"), {}, to_score(["bad", "b"]), to_score("好", id="好"), pair("c", "d"), {}]
    text = "".join(json.dumps(line) + "\n" for line in lines_of(*raw)).encode()
    output = tmp_path / "out.jsonl"
    for size in range(len(text) + 1):
        output.write_bytes(text[:size])
        assert resumed(raw, output) == lines_of(*raw)
        assert output.read_bytes() == text


def test_errors_are_tried_again_wherever_they_are_and_good_lines_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polar_xtuner.scored_lines.BATCH", 3)
    output = tmp_path / "out.jsonl"
    raw = [to_score("bad"), {}, *(to_score(["x", "y" * n]) for n in range(8))]
    lines = lines_of(*raw)
    for number in (2, 4, 5, 8, 9):
        lines[number].update(scores=[None, 0.5], error="output[0]: the server is gone")
    lines[3]["scores"] = [0.25, 0.75]  # as it was
    output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = lines_of(*raw)
    expected[3] = lines[3]
    assert resumed(raw, output) == expected


@pytest.mark.parametrize("change", ["other text", "other settings", "fewer rows", "other place"])
def test_an_output_of_other_rows_is_refused_and_left_alone(change: str, tmp_path: Path) -> None:
    raw = [to_score("a"), to_score("b"), to_score("c")]
    output = tmp_path / "out.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in lines_of(*raw)) + '{"half'
    output.write_text(text)
    if change == "other text":
        raw[1] = to_score("x")
    elif change == "fewer rows":
        raw.pop()
    elif change == "other place":
        raw.insert(0, to_score("new"))
    with pytest.raises(ValueError, match=r"out.jsonl"):
        resumed(raw, output, "other" if change == "other settings" else "")
    assert output.read_text() == text
    assert [*tmp_path.iterdir()] == [output]


@pytest.mark.parametrize("content", ["not JSON\n", "[1]\n", '{"a": 1}\n'])
def test_a_file_that_is_no_output_is_refused(content: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text(content)
    with pytest.raises(ValueError, match=r"out.jsonl:1 is no line of scores"):
        resumed([to_score("a")], output)
    assert output.read_text() == content


def test_parquet_holds_what_lines_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar_xtuner.scored_lines.BATCH", 2)
    lines = lines_of(to_score("a"), {}, to_score(["bad", "b"]), pair("c", "d"))
    (tmp_path / "l").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_parquet(tmp_path / "l", tmp_path / "out.parquet")
    rows = read_table(tmp_path / "out.parquet").to_pylist()
    assert [{k: v for k, v in r.items() if v is not None} for r in rows] == [
        {k: v for k, v in line.items() if v is not None} for line in lines
    ]


# --- the tool ------------------------------------------------------------------------------------


def score(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return run_forked(ROOT / "tools" / "score.py", *arguments, stdin=stdin)


def printed(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def served(small: Path) -> Iterator[Any]:
    """A server, slow enough to be interrupted."""
    servers = pytest.importorskip("protocol_servers")
    vocab_size = json.loads((small / "base" / "config.json").read_text())["vocab_size"]
    slowly = servers.slow(servers.hash_score, 0.01)
    with servers.running("vllm", "0.32.0", slowly, vocab_size=vocab_size) as server:
        yield server


@pytest.fixture
def through(served: Any) -> list[object]:
    return ["--server", served.address, "--server-type", "vllm", "--max-response-length", 256]


def test_both_routes_print_lines_and_the_accuracy(small: Path, through: list[object]) -> None:
    base, file = small / "base", small / "heldout.jsonl"
    here = score(base, file, "--device", "cpu", "--dtype", "float32", "--max-length", 1024)
    there = score(base, file, *through)
    for result in (here, there):
        assert result.returncode == 0, result.stderr
        lines = printed(result)
        assert [line["line"] for line in lines] == [*range(1, 11)]
        assert all(len(line["chosen_scores"]) == 1 for line in lines)
        assert "on 10 pairs, mean margin" in result.stderr.splitlines()[-1]


def test_stdin_is_read_as_json_lines_and_json_lists_all(small: Path, through: list[object]) -> None:
    good = to_score(["a", "b"], id="é")
    text = f"{json.dumps(good)}\n\n{{broken\n{json.dumps(pair('c', 'd'))}\n"
    result = score(small / "base", "-", *through, "--json", stdin=text)
    assert result.returncode == 1
    [figures] = printed(result)
    assert [row["line"] for row in figures["rows"]] == [1, 3, 4]
    assert figures["rows"][0]["id"] == "é"
    assert "is not JSON" in figures["rows"][1]["error"]
    assert (figures["n"], figures["errors"], figures["bad_rows"]) == (1, 1, 1)
    assert figures["accuracy"] in (0, 1)
    assert "1 of 3 rows have an error" in result.stderr


def test_a_killed_run_is_continued_and_equals_one_that_was_not(
    small: Path, through: list[object], tmp_path: Path
) -> None:
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    arguments = [small / "base", small / "train.jsonl", *through]
    assert score(*arguments, "--output", whole).returncode == 0
    lines = whole.read_bytes().splitlines()
    assert len(lines) == 400
    command = [sys.executable, str(ROOT / "tools" / "score.py"), *map(str, arguments)]
    process = subprocess.Popen([*command, "--output", str(output)], stderr=subprocess.DEVNULL)
    while not output.exists() or not output.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(output.read_bytes().splitlines())
    print(f"killed after {done} of 400 lines")
    refused = score(*arguments, "--output", output)
    assert refused.returncode == 1
    assert "--resume" in refused.stderr
    other = score(small / "base", small / "heldout.jsonl", *through, "--output", output, "--resume")
    assert other.returncode == 1
    assert "is of another row" in other.stderr
    result = score(*arguments, "--output", output, "--resume", "--json")
    assert result.returncode == 0, result.stderr
    assert output.read_bytes() == whole.read_bytes()
    assert json.loads(result.stdout)["n"] == 400
    assert "rows" not in json.loads(result.stdout)


def test_parquet_comes_complete_or_not_at_all(
    small: Path, through: list[object], tmp_path: Path
) -> None:
    output = tmp_path / "out.parquet"
    arguments = [small / "base", small / "heldout.jsonl", *through, "--output", output]
    partial = tmp_path / "out.parquet.jsonl"
    first = score(*arguments[:-1], partial)  # what an interrupted run leaves
    assert first.returncode == 0, first.stderr
    lines = [json.loads(line) for line in partial.read_text().splitlines()]
    partial.write_bytes(b"".join(partial.read_bytes().splitlines(keepends=True)[:4]))
    result = score(*arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    rows = read_table(output).to_pylist()
    assert [row["chosen_scores"] for row in rows] == [line["chosen_scores"] for line in lines]
    assert score(*arguments, "--resume").returncode == 1


def test_an_output_with_errors_can_be_continued(
    small: Path, through: list[object], tmp_path: Path
) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.parquet"
    rows.write_text(f"{json.dumps(to_score('a'))}\n{{broken\n{json.dumps(to_score('b'))}\n")
    arguments = [small / "base", tmp_path, *through, "--output", output]  # reads not what it writes
    for more in ([], ["--resume"]):
        result = score(*arguments, *more)
        assert result.returncode == 1
        assert "1 of 3 rows have an error" in result.stderr
        assert "--resume tries them again" in result.stderr
        errors = [row["error"] is None for row in read_table(output).to_pylist()]
        assert errors == [True, False, True]
    partial = tmp_path / "out.parquet.jsonl"
    assert len(partial.read_text().splitlines()) == 3
    assert "--resume" in score(*arguments).stderr
    assert "is the output" in score(small / "base", partial, *arguments[1:], "--resume").stderr


def test_lines_of_other_weights_precision_or_route_are_refused(
    small: Path, through: list[object], tmp_path: Path
) -> None:
    base, output = tmp_path / "base", tmp_path / "out.jsonl"
    shutil.copytree(small / "base", base)
    file = small / "heldout.jsonl"
    here = [base, file, "--output", output, "--device", "cpu"]
    lengths = ["--max-length", 8192, "--max-response-length", 256]
    assert score(*here, "--dtype", "float32", *lengths).returncode == 0
    text = output.read_text()
    assert score(*here, "--dtype", "float32", *lengths, "--resume").returncode == 0
    assert "is of another row" in score(*here, "--dtype", "bfloat16", *lengths, "--resume").stderr
    there = [base, file, "--output", output, *through, "--resume"]
    assert "is of another row" in score(*there).stderr
    os.utime(next(base.glob("*.bin")), (0, 0))
    assert "is of another row" in score(*here, "--dtype", "float32", *lengths, "--resume").stderr
    assert output.read_text() == text


@pytest.mark.parametrize(
    "limits",
    [
        {"max_length": 10**6},
        {"max_length": 10**6, "max_response_length": 10**5},
        {"max_length": 10**6, "max_response_length": 50},
        {"max_length": 512, "max_response_length": 100},
    ],
)
def test_both_routes_cut_alike(limits: dict[str, int], small: Path) -> None:
    base = str(small / "base")
    here, there = PolarScorer(base, device="cpu", **limits), RewardModelClient(base, **limits)
    assert here.template.fingerprint == there.template.fingerprint


def test_one_limit_is_enough_through_a_server(small: Path, through: list[object]) -> None:
    result = score(small / "base", small / "heldout.jsonl", *through[:-2], "--max-length", 512)
    assert result.returncode == 0, result.stderr


def test_parquet_without_pyarrow_is_refused_before_anything_is_scored(
    small: Path, through: list[object], tmp_path: Path
) -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules['pyarrow'] = None\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(ROOT / "tools" / "score.py"), str(small / "base")]
    command += [str(small / "heldout.jsonl"), *map(str, through), "--output"]
    result = subprocess.run([*command, "out.parquet"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert "polar_xtuner[score]" in result.stderr
    assert not [*tmp_path.iterdir()]


def test_what_does_not_go_together_is_said(small: Path, tmp_path: Path) -> None:
    base, file = small / "base", small / "heldout.jsonl"
    assert "--resume needs --output" in score(base, file, "--resume").stderr
    assert "stdin" in score(base, "-", file).stderr
    assert "--device" in score(base, file, "--server", "a:1", "--device", "cpu").stderr
    assert "--served-model" in score(base, file, "--served-model", "m").stderr
    missing = score(base, file, tmp_path / "none.jsonl")
    assert "no such file" in missing.stderr
    assert not missing.stdout


def test_the_server_route_needs_no_torch(small: Path, through: list[object]) -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(ROOT / "tools" / "score.py"), str(small / "base")]
    result = subprocess.run(
        [*command, "-", *map(str, through)],
        input=json.dumps(pair("c", "d")),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(printed(result)) == 1
    assert "on 1 pairs" in result.stderr


def test_ctrl_c_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: Any) -> None:
        raise KeyboardInterrupt

    tool = runpy.run_path(str(ROOT / "tools" / "score.py"))["main"]
    monkeypatch.setitem(tool.__globals__, "run", interrupt)
    monkeypatch.setattr(sys, "argv", ["score.py", "model", "rows.jsonl"])
    with pytest.raises(SystemExit) as stopped:
        tool()
    assert stopped.value.code == 130
