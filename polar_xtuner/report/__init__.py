"""What people look at: an evaluation, a check of data, a run's curves, each as one HTML page.

Needs matplotlib and jinja2, which the extra `eval` brings. A page imports what it needs itself: of
data it is neither scipy nor what evaluates models.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polar_xtuner.report.data import write_data_report
    from polar_xtuner.report.evaluation import write_evaluation_report
    from polar_xtuner.report.runs import write_run_report

__all__ = ["write_data_report", "write_evaluation_report", "write_run_report"]

_MODULES = dict(zip(__all__, ("data", "evaluation", "runs")))


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
