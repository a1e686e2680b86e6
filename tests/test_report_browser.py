"""Reports as a browser shows them, on a screen and on a telephone, in light and in dark."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import report_examples as examples

from polar_xtuner.report import write_data_report, write_evaluation_report, write_run_report
from polar_xtuner.report.page import fold
from polar_xtuner.report.text import visible
from polar_xtuner.run_logs import read_runs

EVALUATION = ("margins calibration by-files by-sources by-length by-longer density-0").split()
TRAINING = ("loss", "accuracy", "margin", "lr", "tokens_per_s")
PLOTS = {
    "one": EVALUATION,
    "three": [*EVALUATION, "density-1", "density-2"],
    "data": ["ids-prompt", "ids-reference", "ids-chosen-rejected"],
    "runs": [*(f"train-{name}" for name in TRAINING), "val-0", "val-1", "val-2"],
}
PAGES = [*PLOTS]
WIDTHS = [1280, 390]

# What a reader would call broken: [what, where or which text].
LOOK = r"""
const faults = [];
const root = document.documentElement;
const say = (what, node) => faults.push([what, (node.textContent || node.id || "").slice(0, 60)]);
if (root.scrollWidth > root.clientWidth)
  faults.push(["the page scrolls sideways", root.scrollWidth + " of " + root.clientWidth]);

const channels = colour => colour.match(/[\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
  const c = [r, g, b][i] / 255;
  return sum + weight * (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
}, 0);
const ground = element => {
  for (let e = element; e; e = e.parentElement) {
    const colour = channels(getComputedStyle(e).backgroundColor);
    if (colour.length === 3 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};

const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let read = 0;
while (texts.nextNode()) {
  const node = texts.currentNode;
  if (!node.textContent.trim()) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  const box = range.getBoundingClientRect();
  const element = node.parentElement;
  const style = getComputedStyle(element);
  const svg = element.closest("svg");
  const scale = svg ? svg.getScreenCTM().a : 1;
  read += 1;
  if (!box.width || !box.height) { say("text without size", element); continue; }
  if (parseFloat(style.fontSize) * scale < 12) say("text below 12 px", element);
  const ink = channels(svg ? style.fill : style.color);
  if (contrast(ink, ground(element)) < 4.5) say("text without contrast", element);
  for (let e = svg || element; e && e !== document.body; e = e.parentElement) {
    const clip = getComputedStyle(e);
    if (!svg && clip.overflowX === "visible") continue;
    const edge = e.getBoundingClientRect();
    const isScrolled = clip.overflowX === "auto";  // what is beyond can be reached
    if (!isScrolled && (box.left < edge.left - 1 || box.right > edge.right + 1))
      say("text is cut off at the side", element);
    if (!isScrolled && (box.top < edge.top - 2 || box.bottom > edge.bottom + 2))
      say("text is cut off above or below", element);
    if (isScrolled && e.scrollHeight > e.clientHeight + 1) say("scrolls in itself", element);
    break;
  }
}
for (const svg of document.querySelectorAll("svg.plot")) {
  const boxes = [...svg.querySelectorAll("text")].map(t => [t, t.getBoundingClientRect()]);
  boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
    const beside = a.left > b.right - 1 || b.left > a.right - 1;
    const below = a.top > b.bottom - 3 || b.top > a.bottom - 3;
    if (!beside && !below)
      faults.push(["labels on each other", `${svg.id}: ${one.textContent} / ${other.textContent}`]);
  }));
}
return [read, faults];
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        missing = "needs chromium and chromedriver (Debian: chromium, chromium-driver)"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        "hide-scrollbars",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    several = examples.evaluation(3, 300)
    one = replace(several, models=several.models[:1], comparisons=[])
    for name in ("steady", "stopped"):
        examples.write_start(folder / name, "20260101_000000", range(1, 60), [30])
    examples.write_start(folder / "stopped", "20260102_000000", range(41, 90), [50, 80])
    runs = read_runs([folder / "steady", folder / "stopped"])
    return {
        "one": write_evaluation_report(folder / "one", one),
        "three": write_evaluation_report(folder / "three", several),
        "data": write_data_report(folder / "data", examples.data_result()),
        "runs": write_run_report(folder / "runs", runs, smooth=0.5)[0],
    }


def show(browser: Any, page: Path, width: int = 1280, scheme: str = "light") -> None:
    """Loads the page, with everything unfolded."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_all_text_can_be_read(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    show(browser, pages[name], width, "light" if width > 600 else "dark")
    read, faults = browser.execute_script(LOOK)
    assert read > 100
    assert faults == []


@pytest.mark.parametrize(
    ("style", "what"),
    [
        (".note { font-size: 11px }", "text below 12 px"),
        (".lead { color: #999 }", "text without contrast"),
        (".lead { min-width: 1500px }", "the page scrolls sideways"),
        (".content { white-space: pre }", "text is cut off at the side"),
        (".content { height: 9px }", "text is cut off above or below"),
        ("svg.plot { max-width: 250px }", "text below 12 px"),
        ("svg.plot text { font-size: 40px !important }", "labels on each other"),
    ],
)
def test_what_is_broken_would_be_seen(
    browser: Any, pages: dict[str, Path], style: str, what: str
) -> None:
    show(browser, pages["one"])
    browser.execute_script(
        "document.head.append(Object.assign(document.createElement('style'),"
        " {textContent: arguments[0]}))",
        style,
    )
    _, faults = browser.execute_script(LOOK)
    assert what in [fault for fault, _ in faults]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_every_plot_is_there_and_has_words(
    browser: Any, pages: dict[str, Path], name: str, width: int
) -> None:
    show(browser, pages[name], width)
    plots = browser.execute_script(
        "return [...document.querySelectorAll('svg.plot')].map(svg => {"
        " const box = svg.getBoundingClientRect();"
        " return [svg.id, box.width, box.height, svg.getAttribute('aria-label'),"
        "  svg.querySelectorAll('path').length] })"
    )
    assert sorted(id for id, *_ in plots) == sorted(PLOTS[name])
    for _, wide, high, label, paths in plots:
        assert 300 < wide <= width and high > 60
        assert len(label) > 20 and paths > 3


@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_for_nothing_and_complains_of_nothing(
    browser: Any, pages: dict[str, Path], name: str
) -> None:
    browser.get_log("browser")  # of the tests before
    show(browser, pages[name])
    entries = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert [entry for entry in entries if not entry.startswith("data:")] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    ids, language = browser.execute_script(
        "return [[...document.querySelectorAll('[id]')].map(e => e.id),"
        " document.documentElement.lang]"
    )
    assert len(ids) == len(set(ids)) and language == "en"
    targets = browser.execute_script(
        "return [...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.hash.slice(1))"
    )
    assert targets and set(targets) <= set(ids)


def test_hostile_rows_are_text(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["one"])
    contents = browser.execute_script(
        "return [...document.querySelectorAll('.content')].map(e => e.textContent)"
    )
    for text in examples.HOSTILE:
        assert visible(fold(text)["head"]) in contents
    _nothing_has_run(browser)


def test_markup_that_got_in_would_not_run(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["one"])
    browser.execute_async_script(
        "document.body.insertAdjacentHTML('beforeend', arguments[0]);setTimeout(arguments[1], 200)",
        f'<img src="x" onerror="{examples.ALARM}">',
    )
    assert browser.title != "run"


@pytest.mark.parametrize("name", ["three", "data"])
def test_hostile_names_and_problems_are_text(
    browser: Any, pages: dict[str, Path], name: str
) -> None:
    show(browser, pages[name])
    page = browser.execute_script("return document.body.textContent")
    assert examples.HOSTILE[0] in page and examples.HOSTILE[1] in page
    _nothing_has_run(browser)


def _nothing_has_run(browser: Any) -> None:
    title, alien = browser.execute_script(
        "return [document.title, document.querySelectorAll('script, iframe, img, object, embed,"
        ' form, [onload], [onerror], [onmouseover], a[href^="j"]\').length]'
    )
    assert title != "run" and alien == 0


def test_colours_follow_the_scheme(browser: Any, pages: dict[str, Path]) -> None:
    seen = []
    for scheme in ("light", "dark"):
        show(browser, pages["one"], scheme=scheme)
        seen.append(
            browser.execute_script(
                "const of = e => getComputedStyle(e);"
                "return [of(document.body).backgroundColor,"
                " of(document.querySelector('#margins text')).fill,"
                " of(document.querySelector('#margins [style*=\"stroke: var(--s1)\"]')).stroke]"
            )
        )
    assert all(light != dark for light, dark in zip(*seen))


def test_paper_is_white(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["three"], 760, "dark")
    media = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    ground, nav, beyond = browser.execute_script(
        "return [getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('nav')).display,"
        " document.documentElement.scrollWidth - document.documentElement.clientWidth]"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert (ground, nav, beyond) == ("rgb(255, 255, 255)", "none", 0)
