"""A report is one page that needs nothing else: no network, no script, no file beside it.

What the page shows is data, whatever it holds. Jinja escapes every value, `visible` writes out what
could not be seen, and a content security policy keeps the browser from running or loading anything
even if both failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from polar_xtuner.report.text import ending, short, visible

PAGE = "index.html"

SHOWN = 20_000
"""Characters of a text that a page holds; the rest is counted."""
PREVIEW = 600
PREVIEW_LINES = 12
"""Characters and lines of it that are read without unfolding."""


def write_page(folder: Path, template: str, **values: Any) -> Path:
    """Renders a template of `templates/` as `folder`/index.html, which is whole or as it was.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE
    unfinished = folder / f"{PAGE}.unfinished"
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as stream:
            for part in _environment().get_template(template).generate(**values):
                stream.write(part)
        unfinished.replace(page)
    finally:
        unfinished.unlink(missing_ok=True)
    return page


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("polar_xtuner.report"),
        autoescape=True,
        undefined=StrictUndefined,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
    )
    filters: dict[str, Callable[..., Any]] = {
        "share": share,
        "real": real,
        "figure": figure,
        "signed": signed,
        "count": count,
        "brief": brief,
        "interval": interval,
        "short": short,
        "ending": ending,
        "bytes": of_bytes,
        "duration": duration,
        "fold": fold,
    }
    environment.filters.update(filters)
    return environment


NONE = "–"  # for a figure that there is none of


def count(number: float) -> str:
    """1234567 as 1,234,567."""
    return f"{number:,.0f}" if math.isfinite(number) else NONE


def brief(number: float) -> str:
    """`count`, of which four digits are left: 51234567 as 51.23 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(number) >= size:
            return f"{number / size:.4g} {unit}"
    return count(number)


def share(value: float, digits: int = 3) -> str:
    """A proportion."""
    return f"{value:.{digits}f}" if math.isfinite(value) else NONE


def real(value: float | None, digits: int = 3) -> str:
    """A number of any size."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    small = value != 0 and abs(value) < 10**-digits
    text = f"{value:.2e}" if small or abs(value) >= 1e6 else f"{value:,.{digits}f}"
    return text.replace("-", "−")


def figure(value: float | None) -> str:
    """Any figure, to four digits."""
    if value is None or not math.isfinite(value):
        return real(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = 0 if float(value).is_integer() else max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:,.{digits}f}".replace("-", "−")
    return f"{value:.3e}".replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    """A difference: with its sign."""
    if not math.isfinite(value):
        return NONE
    return f"{value:+.{digits}f}".replace("-", "−")


def interval(low: float, high: float, digits: int = 3, sign: bool = False) -> str:
    """The bounds of a 95 % interval."""
    shown = signed if sign else real
    if not (math.isfinite(low) and math.isfinite(high)):
        return NONE
    return f"{shown(low, digits)} to {shown(high, digits)}"


def of_bytes(number: float) -> str:
    """In GiB."""
    return f"{number / 2**30:,.1f} GiB"


def duration(seconds: float) -> str:
    """As hours and minutes, or minutes and seconds."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600:,} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{seconds:.3g} s"


def fold(text: str) -> dict[str, Any]:
    """A text in the parts that a page shows: the beginning, what follows, and how much is left."""
    lines = text.split("\n", PREVIEW_LINES)
    end = min(PREVIEW, len("\n".join(lines[:PREVIEW_LINES])))
    if len(text) - end < PREVIEW // 4 and len(lines) <= PREVIEW_LINES:
        end = len(text)  # so little is not worth a click
    return {
        "head": text[:end],
        "tail": text[end:SHOWN].removeprefix("\n"),
        "left": max(0, len(text) - SHOWN),
        "characters": len(text),
    }
