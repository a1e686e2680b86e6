"""How validation and test figures are logged: a table for people, every figure for TensorBoard."""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from mmengine.registry import LOG_PROCESSORS
from mmengine.runner import LogProcessor

from polar_xtuner._checks import one_line


@LOG_PROCESSORS.register_module()
class PolarLogProcessor(LogProcessor):  # type: ignore[misc]
    """mmengine's, but for validation: it would put a hundred figures into one line."""

    def get_log_after_epoch(self, runner: Any, batch_idx: int, mode: str, **options: Any) -> Any:
        """Every figure, and a table of those that people look at."""
        tag, _ = super().get_log_after_epoch(runner, batch_idx, mode, **options)
        # As scalars of training have these names, and would be mixed up with them.
        tag = {name: value for name, value in tag.items() if name not in ("time", "data_time")}
        after = f" after iteration {runner.iter}" if mode == "val" else ""
        return tag, f"{mode}{after}\n{table(tag)}"


def table(figures: Mapping[str, Any]) -> str:
    """One line for all pairs, each set, source and control: `<what>/<figure>` by `<what>`."""
    parts: dict[str, dict[str, float]] = {}  # what is NaN, there is nothing of
    for name, value in figures.items():
        what, _, figure = name.rpartition("/")
        if isinstance(value, Real) and not math.isnan(value):
            parts.setdefault(what, {})[figure] = float(value)
    named = [(one_line(what, 60), part) for what, part in parts.items()]
    width = max((len(what) for what, _ in named), default=0)
    lines = [f"  {what:{width}}  {_line(part)}" for what, part in named]
    return "\n".join(lines)


def _line(part: Mapping[str, float]) -> str:
    if "accuracy" not in part:
        return "  ".join(f"{name} {value:.4f}" for name, value in part.items())
    interval = ""
    if "accuracy_low" in part:
        interval = f" [{part['accuracy_low']:.4f}, {part['accuracy_high']:.4f}]"
    shown = [f"accuracy {part['accuracy']:.4f}{interval}"]
    if "pairs" in part:
        shown.insert(0, f"{part['pairs']:8,.0f} pairs")
    for name in ("margin", "loss", "ece", "longer_wins", "accuracy_longer_wrong"):
        if name in part:
            shown.append(f"{name} {part[name]:.4f}")
    return "  ".join(shown)
