"""What mmengine has logged of a run, read back as curves.

Every start of a run has a folder of its own in the work dir, named by the time, with
`vis_data/scalars.json`: one JSON object a log line. A line of training has `iter`; one of
validation has none, and its figures are named by their set, as `val/accuracy`.

A start stands for all that comes after the step it begins at: what an earlier one logged from there
on was lost with the weights. So a curve is cut where the next start begins, and never goes back. A
log line is of the interval before it, and the log does not say where a start begins, so that is
taken to be an interval before its first line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOG = "vis_data/scalars.json"

LARGEST = 1e300
"""Figures beyond are infinite: a plot needs room for their differences and sums."""
LAST_STEP = 2**53
"""Of steps that a plot tells apart."""

_NO_FIGURE = {"step", "iter", "epoch"}
_OF_NO_VALIDATION = {"time", "data_time"}  # mmengine's, of a batch


@dataclass(frozen=True)
class Curve:
    """A figure over a run.

    Attributes:
        steps: (N,) int64, iterations, rising.
        values: (N,) float64; what was not finite is so here, and what was beyond `LARGEST`.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def smoothed(self, weight: float) -> Curve:
        """The exponential moving average that weighs a value `weight` times the one after it.

        Its start is not drawn to zero: the weights of the values so far always add up to 1. What is
        not finite is left out of it.
        """
        values = np.empty_like(self.values)
        total = weights = 0.0
        for i, value in enumerate(self.values):
            if np.isfinite(value):
                total = total * weight + value
                weights = weights * weight + 1
                values[i] = total / weights
            else:
                values[i] = value
        return Curve(self.steps, values)


@dataclass(frozen=True)
class RunLog:
    """All curves of a run by their names in the log, those of training and those of validation."""

    name: str
    training: dict[str, Curve]
    validation: dict[str, Curve]


def read_runs(work_dirs: Sequence[Path]) -> list[RunLog]:
    """The logs of several work dirs, in order; each is read once.

    Runs are named by their folders; where two have one name, by as much of the path as tells them
    apart.

    Raises:
        FileNotFoundError, ValueError: see `read_run`.
    """
    folders = list(dict.fromkeys(work_dir.resolve() for work_dir in work_dirs))
    return [read_run(folder, name) for folder, name in zip(folders, _names(folders))]


def read_run(work_dir: Path, name: str) -> RunLog:
    """The log of a work dir, or of one start of it.

    Raises:
        FileNotFoundError: there is no such folder, or no log in it.
        ValueError: a line, other than the last of a file, is not one of mmengine's.
    """
    if not work_dir.is_dir():
        raise FileNotFoundError(f"no such folder: {work_dir}")
    logs = sorted(work_dir.glob(f"*/{LOG}")) or list(work_dir.glob(LOG))
    if not logs:
        raise FileNotFoundError(
            f"{work_dir} is no work dir of a run, it holds no {LOG} (written with the first log "
            "line, by LocalVisBackend)"
        )
    training = _Curves()
    validation = _Curves()
    for log in logs:
        lines = [*_lines(log)]
        of_training = [line for line in lines if "iter" in line]
        of_validation = [line for line in lines if "iter" not in line]
        begin = _begin(of_training or of_validation[:1])
        training.add(begin, of_training, _NO_FIGURE)
        validation.add(begin, of_validation, _NO_FIGURE | _OF_NO_VALIDATION)
    return RunLog(name, training.finished(), validation.finished())


def _lines(log: Path) -> Iterable[dict[str, Any]]:
    lines = log.read_bytes().splitlines()
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # the latter of brackets in brackets, by thousands
            line = None
        step = line.get("step") if isinstance(line, dict) else None
        if isinstance(step, int) and abs(step) <= LAST_STEP:
            yield line
        elif number < len(lines):  # the last one may be half written
            raise ValueError(f"{log}:{number} is no log line of mmengine, which has a step")


def _figure(value: float) -> float:
    """The value, which may be an integer that no float holds."""
    if abs(value) > LARGEST:
        return math.inf if value > 0 else -math.inf
    return float(value)


def _begin(lines: Sequence[dict[str, Any]]) -> float:
    """The step after which a start begins: an interval before its first line."""
    steps = [line["step"] for line in lines[:2]]
    return steps[0] - max(1, steps[-1] - steps[0]) if steps else math.inf


class _Curves:
    """Curves that grow over the starts of a run."""

    def __init__(self) -> None:
        self._values: dict[int, dict[str, float]] = {}

    def add(self, begin: float, lines: Sequence[dict[str, Any]], others: set[str]) -> None:
        """The lines of a start that begins after a step; `others` name what is no figure."""
        self._values = {step: v for step, v in self._values.items() if step <= begin}
        for line in lines:
            figures = {
                name: _figure(value)
                for name, value in line.items()
                if name not in others and isinstance(value, (int, float))
            }
            self._values.setdefault(line["step"], {}).update(figures)

    def finished(self) -> dict[str, Curve]:
        names = dict.fromkeys(name for values in self._values.values() for name in values)
        curves = {}
        for name in names:
            points = sorted(
                (s, values[name]) for s, values in self._values.items() if name in values
            )
            steps, values = zip(*points)
            curves[name] = Curve(np.array(steps, np.int64), np.array(values, np.float64))
        return curves


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    names: list[str] = []
    for folder in folders:
        for length in range(1, len(folder.parts) + 1):
            end = folder.parts[-length:]
            if sum(other.parts[-length:] == end for other in folders) == 1:
                break
        names.append("/".join(end))
    return names
