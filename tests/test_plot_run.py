"""`tools/plot_run.py`, and the pages of runs."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from commands import ROOT, run
from matplotlib.image import imread
from report_examples import write_start

from polar_xtuner.report.plots import MOST_POINTS
from polar_xtuner.report.runs import training_panels, validation_panels, write_run_report
from polar_xtuner.run_logs import Curve, RunLog, read_runs

TOOL = ROOT / "tools" / "plot_run.py"


@pytest.fixture(scope="module")
def plot_run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_run", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "steady"
    write_start(folder, "20260101_000000", range(1, 21), [10, 20])
    return folder


def test_the_tool_draws_runs_over_each_other(work_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "<b>other"
    write_start(other, "20260101_000000", range(1, 11), loss=math.nan)
    found = run(sys.executable, TOOL, work_dir, other, "--smooth", 0.5, "--json")
    assert found.returncode == 0, found.stdout
    told = json.loads(found.stdout)
    assert told["html"] == str(work_dir / "index.html")
    assert told["runs"]["steady"]["loss"] == pytest.approx(0.7 / 1.4)
    assert told["runs"]["steady"]["val/accuracy"] == 0.8
    assert told["runs"]["<b>other"]["loss"] is None
    page = Path(told["html"]).read_text(encoding="utf-8")
    assert "&lt;b&gt;other" in page and "<b>other" not in page
    picture = imread(told["png"])
    assert picture.shape[0] > 500 and picture.shape[1] > 1000 and picture.std() > 0.01


def test_mistakes_are_told_in_a_line(
    plot_run: ModuleType, work_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["plot_run.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            plot_run.main()
        return str(stopped.value)

    assert told(tmp_path / "nowhere").startswith("plot_run.py: no such folder: ")
    assert "is no work dir of a run" in told(tmp_path)
    (tmp_path / "file").touch()
    assert told(work_dir, "--output", tmp_path / "file").startswith("plot_run.py: ")
    assert told(work_dir, "--smooth", 1) == "2"  # argparse's
    assert not (work_dir / "index.html").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (OSError("disk full"), "plot_run.py: disk full")],
)
def test_it_ends_without_a_traceback(
    plot_run: ModuleType, work_dir: Path, monkeypatch: pytest.MonkeyPatch, error: Any, code: Any
) -> None:
    def fail(text: str) -> None:
        raise error

    monkeypatch.setattr(plot_run, "show", fail)
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(work_dir), "--json"])
    with pytest.raises(SystemExit) as stopped:
        plot_run.main()
    assert stopped.value.code == code and (work_dir / "index.html").is_file()


def test_pages_go_where_they_are_asked_for(
    plot_run: ModuleType, work_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "new" / "folder"
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(work_dir), "--output", str(output)])
    plot_run.main()
    assert {file.name for file in output.iterdir()} == {"index.html", "curves.png"}


def test_smoothing_leaves_the_rate_and_what_was_logged(work_dir: Path) -> None:
    runs = read_runs([work_dir])
    panels = {panel.id: panel.lines[0] for panel in training_panels(runs, 0.9)}
    assert np.array_equal(panels["train-loss"].raw, runs[0].training["loss"].values)
    assert not np.array_equal(panels["train-loss"].y, panels["train-loss"].raw)
    assert panels["train-lr"].raw is None
    assert np.array_equal(panels["train-lr"].y, runs[0].training["lr"].values)


def test_validation_is_drawn_with_its_intervals(work_dir: Path) -> None:
    panels = {panel.title: panel.lines for panel in validation_panels(read_runs([work_dir]))}
    assert [*panels] == ["val/accuracy", "val/loss", "val/web/accuracy"]
    (line,) = panels["val/accuracy"]
    assert np.array_equal(line.low, [0.7, 0.7]) and np.array_equal(line.high, [0.9, 0.9])
    assert panels["val/loss"][0].low is None


@pytest.mark.parametrize(
    ("training", "validation"),
    [
        ({}, {"val/accuracy": [0.5]}),
        ({"loss": [0.7]}, {}),
        ({"loss": [math.nan] * 3, "margin": [math.inf, 1.0, -math.inf]}, {}),
        ({"mine": [1.0, 2.0]}, {"val/accuracy": [3.0], "other": [4.0]}),
        ({"lr": [0.0, 0.0], "loss": [1e300, -1e300]}, {}),
    ],
)
def test_any_log_makes_a_page(
    tmp_path: Path, training: dict[str, list[float]], validation: dict[str, list[float]]
) -> None:
    def curves(values: dict[str, list[float]]) -> dict[str, Curve]:
        return {name: Curve(np.arange(len(v)) + 1, np.array(v)) for name, v in values.items()}

    log = RunLog("$a_b", curves(training), curves(validation))
    page, picture = write_run_report(tmp_path, [log], 0.3)
    assert page.read_text(encoding="utf-8").count("<svg class=") == sum(
        name in ("loss", "margin", "lr", "val/accuracy") for name in [*training, *validation]
    )
    assert picture.stat().st_size > 1000


def test_a_log_of_other_figures_is_refused(tmp_path: Path) -> None:
    log = RunLog("run", {"mine": Curve(np.arange(2), np.ones(2))}, {})
    with pytest.raises(ValueError, match="nothing to draw: run has no loss, accuracy"):
        write_run_report(tmp_path / "page", [log])
    assert not (tmp_path / "page").exists()


def test_a_long_run_makes_a_page_of_the_same_size(tmp_path: Path) -> None:
    sizes = []
    for steps in (MOST_POINTS, 100 * MOST_POINTS):
        values = np.random.default_rng(0).random(steps)
        log = RunLog("run", {"loss": Curve(np.arange(steps), values)}, {})
        page, _ = write_run_report(tmp_path / str(steps), [log])
        sizes.append(page.stat().st_size)
    assert sizes[1] < 1.1 * sizes[0]
