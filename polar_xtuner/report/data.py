"""The page of a check of training data."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from polar_xtuner import __version__
from polar_xtuner.data_checks import GIVEN_AWAY, KINDS
from polar_xtuner.data_result import FIELDS, DataResult, DataWarning, Lengths
from polar_xtuner.report.page import write_page
from polar_xtuner.report.plots import Key, Plot, binned_histogram

ERRORS = 200
"""Errors that the page lists."""
EXAMPLES = 10
"""Warnings of a kind that it lists."""


def write_data_report(folder: Path, result: DataResult) -> Path:
    """Writes `folder`/index.html and gives its path.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    examples: defaultdict[str, list[DataWarning]] = defaultdict(list)
    for warning in result.warnings:
        if len(examples[warning.kind]) < EXAMPLES:
            examples[warning.kind].append(warning)
    return write_page(
        folder,
        "data.html",
        version=__version__,
        result=result,
        fields=FIELDS,
        given_away=GIVEN_AWAY,
        errors=result.errors[:ERRORS],
        warnings=[
            (kind, KINDS.get(kind, ""), n, examples[kind])
            for kind, n in result.warning_counts.items()
        ],
        plots=[*_plots(result)],
    )


def _plots(result: DataResult) -> list[Plot]:
    together = (("prompt",), ("reference",), ("chosen", "rejected"))
    if not any(lengths.count for lengths in result.ids.values()):
        return []
    return [_lengths({name: result.ids[name] for name in names}) for names in together]


def _lengths(fields: dict[str, Lengths]) -> Plot:
    """Of one field, or of two that are to be compared."""
    title = " and ".join(fields)
    told = "; ".join(
        f"{name} median {lengths.median:,.0f}, 90 % up to {lengths.p90:,.0f}, longest "
        f"{lengths.max:,}"
        for name, lengths in fields.items()
    )
    label = f"Histogram of lengths in ids: {told}"
    edges = max((lengths.edges for lengths in fields.values()), key=len)
    series = [
        (key, [*lengths.counts, *[0] * (len(edges) - 1 - len(lengths.counts))])
        for key, lengths in zip(
            (Key("chosen", "s1"), Key("rejected", "s2", "7 3")), fields.values()
        )
    ]
    return binned_histogram(f"ids-{'-'.join(fields)}", title, label, series, edges, "ids")
