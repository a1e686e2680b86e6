"""Plots that follow the page they stand in: its font, its colours in light and in dark.

Everything is drawn with the colours of `LIGHT`, each of which is used for one thing. In a page they
become the CSS variables of the same names (`templates/style.css`), in a PNG they stand. Text stays
text. A plot is `WIDTH` CSS pixels wide, for which a telephone has room; wider screens put plots
side by side. Title and key belong to the page, where a long name can wrap.

People with any colour vision can tell the colours apart (after Okabe and Ito, 2008), and lines of
several models or runs differ in their dashes too.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from polar_xtuner.report.text import ending, ends, short

WIDTH, HEIGHT = 352, 240
"""CSS pixels."""

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1d2126",
    "muted": "#5c6670",
    "rule": "#dde1e6",
    "s1": "#0b65ae",
    "s2": "#bd5200",
    "s3": "#007a5e",
    "s4": "#a14d8b",
    "s5": "#6757b0",
    "s6": "#7a6a00",
}
SERIES = ("s1", "s2", "s3", "s4", "s5", "s6")
DASHES = ("none", "7 3", "2 3", "8 3 2 3")
"""As SVG's `stroke-dasharray` has them."""

MOST_POINTS = 400
"""Of a curve in a page, which has no more pixels: beyond, a point is the mean of its neighbours."""

FONTS = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans GB"),
    *("Microsoft YaHei", "SimHei", "Droid Sans Fallback"),
)
"""Of a picture; matplotlib brings the first, which has no Chinese or Japanese letters."""

_STYLE = {
    "font.size": 12,
    "axes.labelsize": 12,
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titlecolor": LIGHT["ink"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "axes.xmargin": 0.02,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a name may hold dollars
    "legend.frameon": False,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "lines.linewidth": 1.8,
    "savefig.dpi": 72,
    "svg.fonttype": "none",
    "svg.hashsalt": "polar_xtuner",
}


@dataclass(frozen=True)
class Key:
    """What a line or a colour of a plot stands for."""

    name: str
    colour: str
    dashes: str = "none"

    @classmethod
    def of(cls, number: int, name: str) -> Key:
        """The look of the `number`th of several."""
        return cls(name, SERIES[number % len(SERIES)], DASHES[number % len(DASHES)])

    @property
    def line(self) -> dict[str, Any]:
        """For `Axes.plot`."""
        dashes = "-" if self.dashes == "none" else (0, tuple(map(float, self.dashes.split())))
        return {"color": LIGHT[self.colour], "linestyle": dashes}


@dataclass(frozen=True)
class Plot:
    """A plot in a page: `id` is its own there, `label` says in words what it shows."""

    id: str
    title: str
    label: str
    svg: Markup
    keys: Sequence[Key] = ()


@dataclass(frozen=True)
class Line:
    """A curve, with an interval about it where there is one.

    Attributes:
        x, y, low, high: (N,).
        raw: (N,), what `y` has smoothed.
        points: mark every point.
    """

    key: Key
    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    raw: ArrayLike | None = None
    points: bool = False


@dataclass(frozen=True)
class Shares:
    """A proportion and its 95 % interval for each of several groups: (N,) each."""

    key: Key
    values: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


def curves(id: str, title: str, label: str, lines: Sequence[Line]) -> Plot:
    """Lines over the iterations."""
    with _style():
        figure, axes = _figure()
        _draw_curves(axes, lines)
        return _plot(figure, id, title, label, _several([line.key for line in lines]))


def save_curves(path: Path, panels: Sequence[tuple[str, Sequence[Line]]]) -> None:
    """A PNG of curves, two panels beside each other, on white."""
    fonts = [font for font in FONTS if font in font_manager.get_font_names()]
    with _style(), matplotlib.rc_context({"font.family": fonts}):
        rows = -(-len(panels) // 2)
        figure = Figure(figsize=(13, 3.6 * rows + 0.5), facecolor=LIGHT["paper"])
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, 2, squeeze=False).ravel().tolist()
        for axes, (title, lines) in zip(grid, panels):
            _draw_curves(axes, lines)
            axes.set_title(short(title, 60))
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        keys = list(dict.fromkeys(line.key for _, lines in panels for line in lines))
        handles = [Line2D([], [], label=ending(key.name, 60), **key.line) for key in keys]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(keys)))
        figure.savefig(path, dpi=110)


def _draw_curves(axes: Axes, lines: Sequence[Line]) -> None:
    for line in lines:
        x = _thin(line.x)
        colour = LIGHT[line.key.colour]
        if line.low is not None and line.high is not None:
            axes.fill_between(x, _thin(line.low), _thin(line.high), color=colour, alpha=0.16, lw=0)
        if line.raw is not None:
            axes.plot(x, _thin(line.raw), color=colour, alpha=0.25, linewidth=1)
        alone = np.isfinite(np.asarray(line.y, float)).sum() == 1
        marker = "o" if line.points or alone else ""
        axes.plot(x, _thin(line.y), marker=marker, markersize=4.5, **line.key.line)
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(_ticks(5, integer=True))
    axes.yaxis.set_major_locator(_ticks(5))


def _thin(values: ArrayLike) -> Any:
    """At most `MOST_POINTS` of them, each the mean of as many neighbours as the others'."""
    array = np.asarray(values, float)
    if len(array) <= MOST_POINTS:
        return array
    parts = np.array_split(array, MOST_POINTS)
    return np.array([part.mean() for part in parts])  # a nan among them leaves its gap


def histogram(
    id: str, title: str, label: str, series: Sequence[tuple[Key, ArrayLike]], x_label: str
) -> Plot:
    """How values on both sides of 0 are spread: shares of each series, in bins of all of them.

    Args:
        series: keys with (N,) values; what lies beyond the outer 0.1 % of all is in the outer bins.
    """
    with _style():
        figure, axes = _figure()
        values = [np.asarray(each, float) for _, each in series]
        edges = _edges(np.concatenate(values))
        for (key, _), own in zip(series, values):
            counts, _edge = np.histogram(np.clip(own, edges[0], edges[-1]), edges)
            _draw_steps(axes, key, edges, counts / max(len(own), 1), len(series) == 1)
        axes.axvline(0, color=LIGHT["ink"], linewidth=1)
        _finish_histogram(axes, x_label)
        axes.xaxis.set_major_locator(_ticks(6))
        return _plot(figure, id, title, label, _several([key for key, _ in series]))


def _edges(values: Any) -> Any:
    """Of 40 bins or so, one of them at 0."""
    low, high = np.quantile(values, [0.001, 0.999]) if len(values) else (0.0, 1.0)
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / 40 or 0.05
    return np.arange(np.floor(low / width), max(np.ceil(high / width), 1) + 1) * width


def binned_histogram(
    id: str,
    title: str,
    label: str,
    series: Sequence[tuple[Key, ArrayLike]],
    edges: Sequence[int],
    x_label: str,
) -> Plot:
    """Whole numbers that have been counted already, in bins that are drawn equally wide.

    Args:
        series: keys with (B,) counts.
        edges: (B + 1,); bin i has edges[i] <= number < edges[i + 1].
    """
    with _style():
        figure, axes = _figure()
        at = np.arange(len(edges), dtype=float)
        for key, each in series:
            counts = np.asarray(each, float)
            _draw_steps(axes, key, at, counts / max(counts.sum(), 1), len(series) == 1)
        _finish_histogram(axes, x_label)
        shown = range(0, len(edges), -(-len(edges) // 7))
        axes.set_xticks([at[i] for i in shown], [_brief(edges[i]) for i in shown])
        return _plot(figure, id, title, label, _several([key for key, _ in series]))


def _brief(number: float) -> str:
    """As `_log_axis` and bins of numbers have it, 16384 as 16k."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if number >= size and number % size == 0:
            return f"{number // size}{unit}"
    return f"{number:g}"


def _draw_steps(axes: Axes, key: Key, edges: Any, heights: Any, filled: bool) -> None:
    if filled:
        axes.stairs(heights, edges, fill=True, color=LIGHT[key.colour], alpha=0.25)
    axes.stairs(heights, edges, linewidth=1.6, **key.line)


def _finish_histogram(axes: Axes, x_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(_ticks(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share * 100:.3g} %"))


def _log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    few = high < 100 * low
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5) if few else (1,), numticks=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def calibration(
    id: str, title: str, label: str, lines: Sequence[Line], counts: Sequence[ArrayLike]
) -> Plot:
    """Accuracy against confidence, with the pairs of every bin below.

    Args:
        lines: of every curve, (B,) confidences and accuracies; nan where a bin has no pair.
        counts: of every curve, (B,) pairs of its bins, equal ones on [0.5, 1].
    """
    with _style():
        figure = Figure(figsize=(WIDTH / 72, (HEIGHT + 60) / 72))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
        upper.plot([0.5, 1], [0.5, 1], color=LIGHT["muted"], linewidth=1)
        for line, pairs in zip(lines, counts):
            kept = np.isfinite(np.asarray(line.y, float))
            x, y = np.asarray(line.x, float)[kept], np.asarray(line.y, float)[kept]
            upper.plot(x, y, marker="o", markersize=4.5, **line.key.line)
            per_bin = np.asarray(pairs, float)
            edges = np.linspace(0.5, 1, len(per_bin) + 1)
            _draw_steps(lower, line.key, edges, per_bin, len(lines) == 1)
        upper.set_ylabel("accuracy")
        upper.yaxis.set_major_locator(_ticks(5))
        lower.set_ylabel("pairs")
        lower.set_ylim(bottom=0)
        lower.yaxis.set_major_locator(_ticks(2, integer=True))
        lower.set_xlabel("confidence, σ(|margin|)")
        lower.set_xlim(0.49, 1.01)
        return _plot(figure, id, title, label, _several([line.key for line in lines]))


def density(
    id: str,
    title: str,
    label: str,
    lengths: ArrayLike,
    rewards: ArrayLike,
    lines: Sequence[Line],
    x_label: str,
) -> Plot:
    """Rewards against lengths: how many outputs are where, and the means of parts of them.

    Args:
        lengths, rewards: (N,), of all outputs; the outer 0.1 % on each side are not drawn.
        lines: means, by key.
    """
    with _style():
        figure, axes = _figure()
        x = np.maximum(np.asarray(lengths, float), 1)
        y = np.asarray(rewards, float)
        left, right = np.quantile(x, [0.001, 0.999], method="nearest") if len(x) else (1.0, 1.0)
        low, high = np.quantile(y, [0.001, 0.999], method="nearest") if len(y) else (0.0, 1.0)
        pad = 0.04 * (high - low) or 1.0
        shown = (y >= low) & (y <= high) & (x >= left) & (x <= right)
        if shown.any():
            span = (*np.log10([left, max(right, left * 1.1)]), low - pad, high + pad)
            drawn = axes.hexbin(
                x[shown], y[shown], gridsize=(26, 15), xscale="log", mincnt=1, extent=span
            )
            depth = np.log1p(np.asarray(drawn.get_array(), float))
            drawn.set_array(None)
            drawn.set_facecolor(
                [
                    (*_rgb(LIGHT["s5"]), alpha)
                    for alpha in 0.10 + 0.6 * depth / max(depth.max(), 1e-9)
                ]
            )
            drawn.set_edgecolor("none")
            axes.set_ylim(low - pad, high + pad)
        for line in lines:
            axes.plot(
                np.maximum(np.asarray(line.x, float), 1),
                line.y,
                marker="o",
                markersize=4.5,
                **line.key.line,
            )
        _log_axis(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel("reward")
        axes.yaxis.set_major_locator(_ticks(5))
        return _plot(figure, id, title, label, [line.key for line in lines])


def shares(
    id: str, title: str, label: str, names: Sequence[str], series: Sequence[Shares], x_label: str
) -> Plot:
    """Proportions with their intervals, a group a row, series below each other in it."""
    with _style():
        height = 56 + len(names) * (16 + 14 * len(series))
        figure, axes = _figure(height)
        at = np.arange(len(names), dtype=float)
        for i, each in enumerate(series):
            offset = (i - (len(series) - 1) / 2) * 0.72 / max(len(series), 1)
            y = at + offset
            colour = LIGHT[each.key.colour]
            axes.hlines(y, each.lows, each.highs, color=colour, linewidth=1.8)
            axes.plot(each.values, y, "osD^"[i % 4], color=colour, markersize=5.5)
        axes.set_yticks(at, [ends(name, 17) for name in names], color=LIGHT["ink"])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(False, axis="y")
        low = min((low for each in series for low in each.lows if np.isfinite(low)), default=0.0)
        axes.set_xlim(max(-0.02, min(low - 0.04, 0.46)), 1.02)
        axes.axvline(0.5, color=LIGHT["muted"], linewidth=1)
        axes.xaxis.set_major_locator(_ticks(5))
        axes.set_xlabel(x_label)
        return _plot(figure, id, title, label, _several([each.key for each in series]))


def _ticks(most: int, integer: bool = False) -> MaxNLocator:
    """At round numbers."""
    return MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=integer)


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


def _several(keys: Sequence[Key]) -> Sequence[Key]:
    """A key is needed where there are several."""
    return keys if len(keys) > 1 else ()


def _figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    return figure, figure.subplots()


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def _plot(figure: Figure, id: str, title: str, label: str, keys: Sequence[Key]) -> Plot:
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser will have it
        figure.savefig(stream, format="svg", metadata=nothing)
    return Plot(id, title, label, Markup(_inline(stream.getvalue(), id, label)), keys)


def _inline(svg: str, id: str, label: str) -> str:
    """An SVG file as an element of a page."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    # Its names have to be other ones than those of the other plots.
    body = re.sub(r'\bid="', f'id="{id}-', body)
    body = re.sub(r'href="#', f'href="#{id}-', body).replace("url(#", f"url(#{id}-")
    for name, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{name})")
    body = re.sub(r"font-family: [^;\"]+", "font-family: var(--sans)", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", body)
    attributes = f'id="{id}" viewBox="{view[1]}" role="img" aria-label="{escape(label)}"'
    return f'<svg class="plot" {attributes}>{body.strip()}'
