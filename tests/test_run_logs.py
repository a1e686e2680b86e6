"""Logs of mmengine read back as curves."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_examples import write_start

from polar_xtuner.report.runs import write_run_report
from polar_xtuner.run_logs import Curve, read_run, read_runs

STARTS = st.lists(
    st.lists(st.integers(1, 30), min_size=1, unique=True).map(sorted), min_size=1, max_size=4
)


@given(STARTS)
def test_a_later_start_stands_from_an_interval_before_its_first_line(
    tmp_path_factory: pytest.TempPathFactory, starts: list[list[int]]
) -> None:
    work_dir = tmp_path_factory.mktemp("run")
    for number, steps in enumerate(starts):
        write_start(work_dir, f"2026010{number}_000000", steps, loss=lambda s, n=number: n + s / 99)
    survivors = [
        (step, number + step / 99)
        for number, steps in enumerate(starts)
        for step in steps
        if all(later[0] - _interval(later) >= step for later in starts[number + 1 :])
    ]
    curve = read_run(work_dir, "run").training["loss"]
    assert [*zip(curve.steps.tolist(), curve.values.tolist())] == sorted(survivors)


def _interval(steps: list[int]) -> int:
    return steps[1] - steps[0] if len(steps) > 1 else 1


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    write_start(tmp_path, "20260101_000000", range(10, 101, 10))
    write_start(tmp_path, "20260102_000000", range(90, 131, 10))
    steps = read_run(tmp_path, "run").training["loss"].steps
    assert steps.tolist() == list(range(10, 131, 10))


def test_a_run_that_began_anew_has_nothing_of_the_one_before(tmp_path: Path) -> None:
    write_start(tmp_path, "20260101_000000", range(1, 101))
    write_start(tmp_path, "20260102_000000", range(10, 51, 10))
    assert read_run(tmp_path, "run").training["loss"].steps.tolist() == [10, 20, 30, 40, 50]


@given(st.data())
def test_a_line_that_is_being_written_is_left_out(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    work_dir = tmp_path_factory.mktemp("run")
    log = write_start(work_dir, "20260101_000000", range(1, 6))
    content = log.read_bytes()
    first = content.index(b"\n")
    cut = data.draw(st.integers(first + 1, len(content)))
    log.write_bytes(content[:cut])
    # The newline of a whole line may be what is missing.
    whole = content[:cut].count(b"\n") + (content[cut : cut + 1] == b"\n")
    steps = read_run(work_dir, "run").training["loss"].steps
    assert steps.tolist() == list(range(1, whole + 1))


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    log = write_start(tmp_path, "20260101_000000", range(1, 4))
    huge = json.dumps({"iter": 1, "step": 2**63, "loss": 1})
    for broken in ("{", "[1]", '{"loss": 1}', "\x00\x00", huge, "[" * 100_000, "9" * 5_000):
        lines = log.read_text().splitlines()
        lines[1] = broken
        log.write_text("\n".join(lines) + "\n")
        with pytest.raises(ValueError, match=r"scalars\.json:2 is no log line"):
            read_run(tmp_path, "run")


def test_training_and_validation_are_told_apart(tmp_path: Path) -> None:
    write_start(tmp_path, "20260101_000000", range(1, 11), [5, 10])
    run = read_run(tmp_path, "run")
    assert run.training["time"].values.tolist() == [1.0] * 10  # no validation's
    assert run.validation["val/web/accuracy"].steps.tolist() == [5, 10]
    assert {name.split("/")[0] for name in run.validation} == {"val"}
    assert not {"iter", "step"} & {*run.training}


def test_validation_before_the_resumed_step_stays(tmp_path: Path) -> None:
    write_start(tmp_path, "20260101_000000", range(1, 11), [4, 8])
    write_start(tmp_path, "20260102_000000", range(6, 17), [8, 12, 16])
    assert read_run(tmp_path, "run").validation["val/loss"].steps.tolist() == [4, 8, 12, 16]


def test_what_is_not_finite_is_kept(tmp_path: Path) -> None:
    log = write_start(tmp_path, "20260101_000000", [1])
    log.write_text('{"loss": NaN, "margin": Infinity, "note": "x", "iter": 1, "step": 1}\n')
    training = read_run(tmp_path, "run").training
    assert math.isnan(training["loss"].values[0]) and training["margin"].values[0] == math.inf
    assert "note" not in training


def test_what_no_plot_can_hold_is_infinite(tmp_path: Path) -> None:
    log = write_start(tmp_path, "20260101_000000", [1])
    values = (10**400, -(10**400), 1e308, -1e308, 1e300)
    lines = (f'{{"loss": {value}, "iter": {i}, "step": {i}}}\n' for i, value in enumerate(values))
    log.write_text("".join(lines))
    run = read_run(tmp_path, "run")
    inf = math.inf
    assert run.training["loss"].values.tolist() == [inf, -inf, inf, -inf, 1e300]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(path.is_file() for path in write_run_report(tmp_path, [run], 0.5))


def test_a_start_of_a_run_can_be_read_alone(tmp_path: Path) -> None:
    write_start(tmp_path, "20260101_000000", range(1, 4))
    write_start(tmp_path, "20260102_000000", range(3, 6))
    alone = read_run(tmp_path / "20260101_000000", "run")
    assert alone.training["loss"].steps.tolist() == [1, 2, 3]


def test_folders_without_a_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder: /"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="is no work dir of a run"):
        read_runs([tmp_path])


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/x", "b/x", "b/y")]
    for folder in folders:
        write_start(folder, "20260101_000000", [1])
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["a/x", "b/x", "y"]


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    st.floats(0, 0.99),
)
def test_smoothing_is_a_weighted_mean_of_the_past(values: list[float], weight: float) -> None:
    curve = Curve(np.arange(len(values)), np.array(values))
    smoothed = curve.smoothed(weight).values
    for i in range(len(values)):
        weights = weight ** np.arange(i, -1, -1.0)
        expected = np.average(values[: i + 1], weights=weights)
        assert smoothed[i] == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_smoothing_goes_on_after_what_is_not_finite() -> None:
    curve = Curve(np.arange(4), np.array([1.0, math.nan, math.inf, 3.0]))
    smoothed = curve.smoothed(0.5).values
    assert math.isnan(smoothed[1]) and smoothed[2] == math.inf
    assert smoothed[3] == pytest.approx((0.5 * 1 + 3) / 1.5)


def test_a_real_run_is_read(make: Callable[..., Any]) -> None:
    runner = make(4, log_interval=1)
    runner.train()
    run = read_run(Path(runner.work_dir), "run")
    (log,) = Path(runner.work_dir).glob("*/vis_data/scalars.json")
    written = [json.loads(line) for line in log.read_text().splitlines()]
    for name in ("loss", "accuracy", "margin", "lr", "tokens_per_s", "grad_norm"):
        assert run.training[name].steps.tolist() == [1, 2, 3, 4]
        assert run.training[name].values.tolist() == [line[name] for line in written]
    assert run.validation == {}
