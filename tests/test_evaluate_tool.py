"""`tools/evaluate.py` on a very small model, as a folder and as a checkpoint of its weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from commands import ROOT, TINY
from mmengine.config import Config

from polar_xtuner.rewards import read_calibration
from polar_xtuner.scoring import PolarScorer

TOOL = ROOT / "tools" / "evaluate.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def evaluate(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What the tool prints with --json, in this process, after other tests' logging."""

    def run(*arguments: object) -> dict[str, Any]:
        tool.evaluate(tool.parse([*map(str, arguments), "--json", "--device", "cpu"]))
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def model(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small base model with a head, which gives all outputs 0 without."""
    folder = tmp_path_factory.mktemp("hf") / "hf"
    shutil.copytree(small / "base", folder)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.manual_seed(0)
    state["v_head.weight"] = torch.randn_like(state["v_head.weight"])
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def rows(model: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pairs with prompts of the demo, of which the model ranks two wrong, and the same texts as
    candidates with labels."""
    pairs = [json.loads(line) for line in (small / "heldout.jsonl").read_text().splitlines()]
    scorer = PolarScorer(str(model), device="cpu")
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with file.open("w") as out:
        for number, row in enumerate(pairs):
            sides = [row.pop("chosen"), row.pop("rejected")]
            rewards = scorer([{**row, "output": side} for side in sides])
            best = rewards.index(max(rewards)) if number % 5 else rewards.index(min(rewards))
            pair = {"chosen": sides[best], "rejected": sides[1 - best]}
            out.write(json.dumps({**row, **pair}) + "\n")
            out.write(json.dumps({**row, "output": sides, "labels": [1, 0]}) + "\n")
    return file


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the model's weights, with the config beside it, as a run leaves them."""
    state = torch.load(model / "pytorch_model.bin", weights_only=True)
    folder = tmp_path_factory.mktemp("work_dir")
    weights = {name.replace("model.", "llm.", 1): value for name, value in state.items()}
    torch.save({"state_dict": weights, "meta": {"iter": 1}}, folder / "iter_1.pth")
    cfg = Config.fromfile(str(TINY))
    cfg.merge_from_dict({"pretrained_model_name_or_path": str(model)})
    cfg.dump(str(folder / "polar_tiny.py"))
    return folder / "iter_1.pth"


def test_a_checkpoint_is_scored_as_the_model_that_it_is_converted_to(
    evaluate: Any, model: Path, rows: Path, checkpoint: Path, tmp_path: Path
) -> None:
    scores = tmp_path / "scores.jsonl"
    found = evaluate(model, rows, "--against", checkpoint, "--controls", "--scores", scores)
    assert found["pairs"]["pairs"] == found["best_of_n"]["rows"] == 10
    assert found["pairs"]["accuracy"] == 0.8 and found["pairs"]["ties"] == 0
    [against] = found["against"]
    difference = against["difference"]["pairs"]
    assert difference["accuracy_difference"] == 0.0
    assert difference["loss_difference"] == pytest.approx(0.0, abs=1e-6)
    assert against["pairs"]["margin"] == pytest.approx(found["pairs"]["margin"], abs=1e-6)
    shuffled = found["shuffled_references"]["pairs"]
    assert shuffled["pairs"] == 10 and shuffled["margin"] != found["pairs"]["margin"]

    raw = [json.loads(line) for line in rows.read_text().splitlines()]
    items = [{**row, "output": row["chosen"]} for row in raw[::2]]
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    rewards = [reward for line in lines[::2] for reward in line["chosen_scores"]]
    assert rewards == pytest.approx(PolarScorer(str(model), device="cpu")(items), abs=1e-6)


def test_a_calibrated_model_answers_in_probabilities(
    evaluate: Any, model: Path, rows: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(model, folder)
    found = evaluate(folder, rows, "--calibrate")
    calibration = read_calibration(folder)
    assert found["pairs"]["accuracy"] > 0.5 and calibration.temperature > 0
    after = json.loads((folder / "config.json").read_text())
    assert after.pop("polar_calibration")
    assert after == json.loads((model / "config.json").read_text())
    item = {"prompt": "p", "reference": "r", "output": "o"}
    [raw] = PolarScorer(str(folder), device="cpu")(item)
    [normalised] = PolarScorer(str(folder), device="cpu", normalize=True)(item)
    assert raw is not None and normalised == pytest.approx(calibration.apply(raw))


def test_what_cannot_be_done_is_said_before_scoring(
    evaluate: Any, model: Path, rows: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr("polar_xtuner.scoring.PolarScorer.stream", fail)
    (tmp_path / "there.jsonl").touch()
    for arguments, message in (
        ((model, rows, "--scores", tmp_path / "there.jsonl"), "exists: remove it"),
        ((model, rows, "--scores", tmp_path / "x.csv"), "must be a .jsonl or .parquet file"),
        ((model, rows, "--scores", tmp_path / "no" / "x.jsonl"), "there is no folder"),
        ((model, rows, "--report", rows), "is a file"),
        ((model, rows, "--config", TINY), "are for training checkpoints"),
        ((model, rows, "--against", model / "config.json"), "needs the config of its run"),
        ((model, rows, "--against", tmp_path / "none"), "is no folder here"),
        ((checkpoint, rows, "--calibrate"), "convert a checkpoint"),
        ((model, tmp_path / "there.jsonl"), "no row to evaluate in"),
        ((tmp_path, rows), "neither a Hugging Face folder"),
        ((model, tmp_path / "no.jsonl"), "no such file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            evaluate(*arguments)


@pytest.mark.parametrize("option", ["--scores", "--report"])
def test_a_folder_that_cannot_be_written_to_is_said_before_scoring(
    evaluate: Any, model: Path, rows: Path, option: str, monkeypatch: Any
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr("polar_xtuner.scoring.PolarScorer.stream", fail)
    where = {"--scores": "/proc/scores.jsonl", "--report": "/proc/page"}[option]
    with pytest.raises(ValueError, match=f"^{option}: /proc.* cannot be written to: "):
        evaluate(model, rows, option, where)


@pytest.mark.parametrize("calibrate", [False, True])
def test_results_are_written_though_they_cannot_be_printed_and_printed_though_not_written(
    tool: ModuleType, model: Path, rows: Path, tmp_path: Path, monkeypatch: Any, calibrate: bool
) -> None:
    said: list[str] = []

    def fail(text: str) -> None:
        said.append(text)
        raise OSError("full")

    def no_temperature(evaluation: Any) -> None:
        raise ValueError("no temperature")

    monkeypatch.setattr(tool, "show", said.append if calibrate else fail)
    monkeypatch.setattr("polar_xtuner.calibration.calibration_of", no_temperature)
    scores, page = tmp_path / "scores.jsonl", tmp_path / "new" / "page"
    options = ["--scores", scores, "--report", page, "--device", "cpu"]
    options += ["--calibrate"] if calibrate else []
    with pytest.raises((OSError, ValueError), match="no temperature" if calibrate else "full"):
        tool.evaluate(tool.parse([*map(str, (model, rows, *options))]))
    assert len(scores.read_text().splitlines()) == 20 and (page / "index.html").is_file()
    assert "accuracy" in said[0]


def test_ctrl_c_ends_without_a_traceback(
    tool: ModuleType, model: Path, rows: Path, monkeypatch: Any
) -> None:
    def interrupt(args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "evaluate", interrupt)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(model), str(rows)])
    with pytest.raises(SystemExit) as raised:
        tool.main()
    assert raised.value.code == 130


def test_people_get_tables_and_one_line_of_what_is_wrong(
    tool: ModuleType, model: Path, rows: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(model), str(rows), "--device", "cpu"])
    tool.main()
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "best of N" in printed
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "reference": "r", "output": ["a", "b"]}\n')
    for file, message in (
        ("nowhere.jsonl", "evaluate.py: no such file or folder: nowhere.jsonl"),
        (str(bad), f"evaluate.py: 1 of 1 rows are bad:\n  {bad}:1: labels: is missing"),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(model), file])
        with pytest.raises(SystemExit) as raised:
            tool.main()
        assert str(raised.value).startswith(message)
    assert str(raised.value).endswith("--on-bad-row skip.")
    for option, value in (("--seed", "-1"), ("--max-length", "0"), ("--max-packed-length", "x")):
        with pytest.raises(SystemExit):
            tool.parse([str(model), str(rows), option, value])


def test_standard_output_is_the_json_object_alone(model: Path, rows: Path) -> None:
    command = [sys.executable, str(TOOL), str(model), str(rows), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pairs"]["accuracy"] == 0.8
