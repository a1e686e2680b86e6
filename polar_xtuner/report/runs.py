"""The page, and the picture, of the curves of training runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from polar_xtuner import __version__
from polar_xtuner.report.page import write_page
from polar_xtuner.report.plots import Key, Line, Plot, curves, save_curves
from polar_xtuner.run_logs import Curve, RunLog

PICTURE = "curves.png"

TRAINING = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "margin": "Margin, chosen − rejected reward",
    "lr": "Learning rate",
    "tokens_per_s": "Throughput, tokens a second",
    "pairs_per_s": "Throughput, pairs a second",
    "grad_norm": "Norm of the gradient",
    "pack_fill": "Fill of packs",
}
"""Curves of training that are drawn, in this order, where a run has them."""

VALIDATION = ("accuracy", "loss", "margin", "ece")
"""Figures of validation that are drawn; of its sets, sources and controls the first one."""


class Panel(NamedTuple):
    """Curves of one figure."""

    id: str
    title: str
    lines: list[Line]


def write_run_report(folder: Path, runs: Sequence[RunLog], smooth: float = 0.0) -> list[Path]:
    """Writes `folder`/index.html and `folder`/curves.png and gives their paths.

    Args:
        runs: to be drawn over each other.
        smooth: weight of `Curve.smoothed`, in [0, 1), for curves of training; what was logged stays
            visible behind.

    Raises:
        OSError: the folder cannot be made or written to.
        ValueError: none of the logs has a figure to draw.
    """
    training, validation = training_panels(runs, smooth), validation_panels(runs)
    if not training and not validation:
        names = ", ".join(run.name for run in runs)
        raise ValueError(f"nothing to draw: {names} has no {', '.join(TRAINING)}")
    page = write_page(
        folder,
        "runs.html",
        version=__version__,
        names=[run.name for run in runs],
        smooth=smooth,
        training=[_plot(panel) for panel in training],
        validation=[_plot(panel) for panel in validation],
        table=last_values(runs),
        steps=[max((c.steps[-1] for c in run.training.values()), default=0) for run in runs],
    )
    picture = folder / PICTURE
    save_curves(picture, [(panel.title, panel.lines) for panel in [*training, *validation]])
    return [page, picture]


def last_values(runs: Sequence[RunLog]) -> dict[str, list[float | None]]:
    """The last value of every figure, of each run; None where a run has no such figure."""
    names = dict.fromkeys(
        name for run in runs for name in [*_ordered(run.training), *run.validation]
    )
    return {name: [_last(run, name) for run in runs] for name in names}


def training_panels(runs: Sequence[RunLog], smooth: float) -> list[Panel]:
    panels = []
    for name, title in TRAINING.items():
        lines = [
            _training_line(key, run.training[name], smooth if name != "lr" else 0.0)
            for key, run in zip(_keys(runs), runs)
            if name in run.training
        ]
        if lines:
            panels.append(Panel(f"train-{name}", title, lines))
    return panels


def validation_panels(runs: Sequence[RunLog]) -> list[Panel]:
    """Of figures that are named as <prefix>/accuracy, <prefix>/<part>/accuracy and so on."""
    names = dict.fromkeys(name for run in runs for name in run.validation)
    wholes = [name for name in names if name.count("/") <= 1 and _figure(name) in VALIDATION]
    parts = [name for name in names if name.count("/") > 1 and _figure(name) == VALIDATION[0]]
    wholes.sort(key=lambda name: VALIDATION.index(_figure(name)))
    panels = []
    for number, name in enumerate([*wholes, *parts]):
        lines = [
            _validation_line(key, run, name)
            for key, run in zip(_keys(runs), runs)
            if name in run.validation
        ]
        panels.append(Panel(f"val-{number}", name, lines))
    return panels


def _figure(name: str) -> str:
    return name.rpartition("/")[2]


def _training_line(key: Key, curve: Curve, smooth: float) -> Line:
    if not smooth:
        return Line(key, curve.steps, curve.values)
    return Line(key, curve.steps, curve.smoothed(smooth).values, raw=curve.values)


def _validation_line(key: Key, run: RunLog, name: str) -> Line:
    curve = run.validation[name]
    bounds = [run.validation.get(f"{name}_{end}") for end in ("low", "high")]
    values = [b.values for b in bounds if b is not None and len(b.steps) == len(curve.steps)]
    low, high = values if len(values) == 2 else (None, None)
    return Line(key, curve.steps, curve.values, low, high, points=True)


def _plot(panel: Panel) -> Plot:
    ends = "; ".join(f"{line.key.name} ends at {np.ravel(line.y)[-1]:.4g}" for line in panel.lines)
    return curves(panel.id, panel.title, f"{panel.title} by iteration: {ends}", panel.lines)


def _keys(runs: Sequence[RunLog]) -> list[Key]:
    return [Key.of(number, run.name) for number, run in enumerate(runs)]


def _ordered(names: Iterable[str]) -> list[str]:
    """Those that are drawn first."""
    have = list(names)
    return [*(name for name in TRAINING if name in have), *(n for n in have if n not in TRAINING)]


def _last(run: RunLog, name: str) -> float | None:
    curve = run.training.get(name) or run.validation.get(name)
    return None if curve is None else float(curve.values[-1])
