"""What the pages of reports hold; `test_report_browser.py` looks at them."""

from __future__ import annotations

import re
import sys
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_examples as examples
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_xtuner.model_evaluation import Evaluation, compare_models, evaluate_model
from polar_xtuner.records import Row
from polar_xtuner.report import page, write_data_report, write_evaluation_report
from polar_xtuner.report.evaluation import WORST, worst_pairs
from polar_xtuner.report.plots import LIGHT
from polar_xtuner.report.text import ending, ends, short, visible
from polar_xtuner.rewards import Scored

ANY_TEXT = st.text(st.characters())  # lone surrogates too


class Reader(HTMLParser):
    """The text and the attributes of a page."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(content)
        self.close()

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        self.text += " " if tag in ("td", "th") else ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs


def words(path: Path) -> str:
    return " ".join(Reader(path.read_text(encoding="utf-8")).text.split())


class Given:
    """Gives the rewards that it is told, in order."""

    def __init__(self, rewards: Any) -> None:
        self.rewards = iter(rewards)

    def stream(self, items: Any) -> Any:
        return (Scored(float(next(self.rewards)), None) for _ in items)


def pair(number: int, source: str | None = None, chosen: str = "yes", rejected: str = "no") -> Row:
    """A row of one pair."""
    return Row(
        *(f"Prompt {number}", "reference", (chosen,), (rejected,), (), "sft"),
        *(source, None, 0.0, "rows.jsonl", number + 1, {}),
    )


def of_rewards(rows: list[Row], rewards: Any, **options: Any) -> Evaluation:
    model = evaluate_model("model", Given(rewards), rows, **options)
    return Evaluation(["rows.jsonl"], 0, 0, [model])


@given(ANY_TEXT)
def test_any_text_is_shown_and_stays_text(text: str) -> None:
    template = '<p title="{{ text }}">{{ text }}</p>'
    content = page._environment().from_string(template).render(text=text)
    content.encode()  # surrogates cannot be
    reader = Reader(content)
    assert reader.text == visible(text)
    assert reader.attributes == [("title", visible(text))]


@given(ANY_TEXT)
def test_visible_text_has_nothing_that_hides_or_reorders(text: str) -> None:
    shown = visible(text)
    hidden = {"\n", "\t"}
    for char in set(shown) - hidden:
        assert unicodedata.category(char) not in ("Cc", "Cs")
        assert unicodedata.bidirectional(char) not in ("LRO", "RLO", "LRI", "RLI", "FSI")
    assert visible(shown) == shown
    if text.isascii() and text.isprintable():
        assert shown == text


def test_piled_up_marks_are_counted() -> None:
    assert visible("e" + "\u0301" * 300) == "e" + "\u0301" * 4 + "[+296 marks]"
    assert visible("e\u0323\u0302\u0301") == "e\u0323\u0302\u0301"


@given(ANY_TEXT, st.integers(2, 30))
def test_names_are_shortened_to_one_line(text: str, length: int) -> None:
    for shortened in (short(text, length), ending(text, length), ends(text, length)):
        assert len(shortened) <= length and "\n" not in shortened
    line = " ".join(visible(text).split())
    if len(line) <= length:
        assert short(text, length) == ending(text, length) == ends(text, length) == line


def test_names_that_differ_at_either_end_stay_apart() -> None:
    assert ends("dataset/a_long_subset/a", 17) == "datas…ng_subset/a"
    assert ends("dataset/a_long_subset/b", 17) == "datas…ng_subset/b"
    assert ends("one of the datasets", 17) != ends("two of the datasets", 17)
    assert ends("e\u0301" * 20, 17) == "e\u0301" * 2 + "…" + "e\u0301" * 5


def test_sources_of_a_plot_are_told_apart(tmp_path: Path) -> None:
    rows = [pair(i, f"dataset/a_long_subset/{'ab'[i % 2]}") for i in range(4)]
    text = words(write_evaluation_report(tmp_path, of_rewards(rows, [1, 0] * 4)))
    assert "datas…ng_subset/a" in text and "datas…ng_subset/b" in text


@given(st.lists(st.text("ab ", max_size=300), max_size=30))
def test_a_folded_text_is_whole(lines: list[str]) -> None:
    text = "\n".join(lines)
    parts = page.fold(text)
    fold = parts["characters"] - len(parts["head"]) - len(parts["tail"])  # a newline, or nothing
    assert text == parts["head"] + "\n" * fold + parts["tail"] and parts["left"] == 0
    assert parts["head"].count("\n") < page.PREVIEW_LINES
    assert len(parts["head"]) < 1.25 * page.PREVIEW
    if len(text) <= page.PREVIEW and len(lines) <= page.PREVIEW_LINES:
        assert parts["head"] == text


def test_what_a_page_leaves_out_is_counted() -> None:
    parts = page.fold("x" * 100_000)
    assert len(parts["head"] + parts["tail"]) == page.SHOWN
    assert parts["left"] == 100_000 - page.SHOWN


def test_a_page_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_data_report(tmp_path, examples.data_result())
    before = written.read_bytes()
    broken = replace(examples.data_result(), fill=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        write_data_report(tmp_path, broken)
    assert written.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]


def test_figures_are_shown_with_their_sign_and_digits() -> None:
    assert [page.real(x) for x in (1234.5, -0.5, 1e-9, float("nan"), float("inf"))] == [
        *("1,234.500", "−0.500", "1.00e−09", "–", "∞")
    ]
    assert [page.figure(x) for x in (0.00123456, 123456.7, 8.0, 1e9)] == [
        *("0.001235", "123,457", "8", "1.000e+09")
    ]
    assert page.signed(0.25) == "+0.250" and page.signed(-1.0) == "−1.000"
    assert page.brief(51_234_567) == "51.23 M" and page.brief(999_999) == "999,999"
    assert page.duration(6612) == "1 h 50 min" and page.duration(61) == "1 min 1 s"


@pytest.fixture(scope="module")
def several() -> Evaluation:
    return examples.evaluation(2, 120)


def test_an_evaluation_is_told_in_its_own_figures(several: Evaluation, tmp_path: Path) -> None:
    text = words(write_evaluation_report(tmp_path, several))
    for model in several.models:
        pairs, shuffled = model.figures.pairs, model.shuffled
        assert visible(model.name) in text
        assert f"{pairs['accuracy']:.3f}" in text
        assert f"{pairs['accuracy_low']:.3f} to {pairs['accuracy_high']:.3f}" in text
        assert shuffled is not None
        assert f"References shuffled: {shuffled.pairs['accuracy']:.3f}" in text
    (one,) = several.comparisons
    difference = page.signed(one.pairs["accuracy_difference"])
    low, high = (one.pairs[f"accuracy_difference_{end}"] for end in ("low", "high"))
    assert f"{difference} {page.signed(low)} to {page.signed(high)}" in text
    assert "3 bad rows were left out" in text


def test_the_same_results_make_the_same_page(several: Evaluation, tmp_path: Path) -> None:
    pages = [write_evaluation_report(tmp_path / name, several) for name in ("a", "b")]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_plots_have_no_colour_of_their_own(several: Evaluation, tmp_path: Path) -> None:
    content = write_evaluation_report(tmp_path, several).read_text(encoding="utf-8")
    plots = re.findall(r'<svg class="plot".*?</svg>', content, re.S)
    assert len(plots) == 8
    for plot in plots:
        assert not re.search(r"(?:fill|stroke): #", plot)
        assert {*re.findall(r"var\(--(\w+)\)", plot)} <= {*LIGHT, "sans"}


def test_colours_of_plots_are_those_of_the_page() -> None:
    style = (Path(page.__file__).parent / "templates" / "style.css").read_text()
    light = dict(re.findall(r"--(\w+): (#\w{6})", style[: style.index("@media")]))
    assert {name: light[name] for name in LIGHT} == LIGHT
    dark = style[style.index("dark)") :]
    assert {*light} <= {*re.findall(r"--(\w+): #", dark[: dark.index("@media")])}


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=60))
def test_the_worst_rows_are_those_of_the_lowest_margins(rewards: list[tuple[int, int]]) -> None:
    rows = [pair(number) for number in range(len(rewards))]
    model = evaluate_model("model", Given(np.ravel(rewards)), rows)
    worst = worst_pairs([model], 0)
    expected = sorted(range(len(rows)), key=lambda i: (rewards[i][0] - rewards[i][1], i))[:WORST]
    assert [found.row.line - 1 for found in worst] == expected
    assert [(w.chosen_score, w.rejected_score) for w in worst] == [rewards[i] for i in expected]


def test_a_row_is_among_the_worst_once_by_its_worst_pair() -> None:
    row = replace(pair(0), chosen=("a", "b"), rejected=("c", "d"))
    models = [
        evaluate_model(name, Given(rewards), [row, pair(1)])
        for name, rewards in (("first", [1, 2, 5, 0, 1, 0]), ("other", [0, 0, 0, 4, 0, 0]))
    ]
    worst = worst_pairs(models, 0)
    assert [(w.row.line, w.chosen, w.rejected, w.margin) for w in worst] == [
        *((1, "a", "c", -4.0), (2, "yes", "no", 1.0))
    ]
    assert worst[0].others == [("other", 0.0)]


@pytest.mark.parametrize(
    ("rows", "rewards"),
    [
        ([pair(0)], [1.0, 0.0]),
        ([pair(0)], [0.0, 0.0]),
        ([pair(i, chosen="", rejected="") for i in range(5)], [1, 0] * 5),
        ([pair(i, f"source {i}") for i in range(60)], [0, 1] * 60),
        ([pair(i, "$", "x" * 10**i) for i in range(6)], [1e300, -1e300] * 6),
        ([pair(i) for i in range(3)], [1e-300, 0] * 3),
    ],
    ids=["one pair", "a tie", "empty texts", "all wrong", "huge", "tiny"],
)
def test_any_evaluation_makes_a_page(tmp_path: Path, rows: list[Row], rewards: Any) -> None:
    results = of_rewards(rows, rewards)
    content = write_evaluation_report(tmp_path, results).read_text(encoding="utf-8")
    assert "nan" not in Reader(content).text
    text = " ".join(Reader(content).text.split())
    assert f"The {min(WORST, len(rows))} rows" in text or "The only row" in text
    assert not re.search(r'd="[^"]*\b(?:nan|inf)', content)


def test_rows_with_labels_alone_make_a_page(tmp_path: Path) -> None:
    rows = [
        replace(pair(i), chosen=(), rejected=(), outputs=("a", "b"), extra={"labels": [1, 0]})
        for i in range(4)
    ]
    text = words(write_evaluation_report(tmp_path, of_rewards(rows, [1, 0, 1, 0, 1, 0, 0, 1])))
    assert "4 rows with 8 candidates" in text and "0.750" in text
    assert "Lowest margins" not in text and "Calibration" not in text


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_a_page_explains_what_it_shows(tmp_path: Path, kind: str, models: int) -> None:
    rows = [pair(i) for i in range(4)]
    if kind == "labels":
        of_outputs = {"outputs": ("a", "b"), "extra": {"labels": [1, 0]}}
        rows = [replace(row, chosen=(), rejected=(), **of_outputs) for row in rows]
    one = of_rewards(rows, [1, 0, 1, 0, 1, 0, 0, 1])
    other = replace(one.models[0], name="other")
    compared = [compare_models(one.models[0], other)]
    results = replace(one, models=[one.models[0], other], comparisons=compared)
    page = write_evaluation_report(tmp_path, one if models == 1 else results)
    content = page.read_text(encoding="utf-8")
    explained = re.findall("<dt>(.*?)</dt>", content)
    of_pairs = ["accuracy", "margin", "loss", "calibration error (ECE)", "temperature"]
    of_pairs += ["McNemar p"] if models == 2 else []
    assert explained == (of_pairs if kind == "pairs" else ["top one is best", "NDCG"])
    shown = kind == "pairs" and models == 2
    assert (">Models</h2>" in content) is (">Models</a>" in content) is shown


def test_best_of_n_is_told_by_file_too(tmp_path: Path) -> None:
    row = replace(pair(0), chosen=(), rejected=(), outputs=("a", "b"), extra={"labels": [1, 0]})
    rows = [replace(row, file=name) for name in ("one.jsonl", "two.jsonl", "two.jsonl")]
    content = write_evaluation_report(tmp_path, of_rewards(rows, [1, 0, 0, 1, 1, 0]))
    reader = Reader(content.read_text(encoding="utf-8"))
    links = [value for name, value in reader.attributes if name == "href" and value[:1] == "#"]
    ids = [f"#{value}" for name, value in reader.attributes if name == "id"]
    assert "#best" in links and {*links} <= {*ids}
    text = " ".join(reader.text.split())
    assert "one.jsonl 1 0.500 1.000" in text and "two.jsonl 2 0.500 0.500" in text


def test_controls_say_what_they_mean(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(100)]
    told = {}
    for name, wrong in (("chance", 50), ("outputs", 5), ("against", 95)):
        rewards = [1, 0] * 100 + [0, 1] * wrong + [1, 0] * (100 - wrong)
        results = of_rewards(rows, rewards, controls=True)
        told[name] = words(write_evaluation_report(tmp_path / name, results))
    assert "it is at chance" in told["chance"]
    assert "by the outputs alone" in told["outputs"]
    assert "prefers what was rejected" in told["against"]


def test_a_check_of_data_is_told_in_its_own_figures(tmp_path: Path) -> None:
    result = examples.data_result()
    text = words(write_data_report(tmp_path, result))
    for told in (
        *("Training would refuse these files.", "230 in 229 rows. The first 200:", "12,373"),
        *("cut: 12,345 findings", "64.3 % of the pairs", "51,234,567", "99.1 %", "46.6 GiB"),
        *("1 h 50 min", "and 12,335 more", "8 H100 at 40 % of the peak"),
    ):
        assert told in text
    assert text.count("chosen[0].content") == 200


def test_what_gives_the_sides_away_is_shown_where_there_is_any(tmp_path: Path) -> None:
    result = examples.data_result()
    found = words(write_data_report(tmp_path / "found", result))
    assert "the same side has it in 95 % or more" in found
    assert "ends with white space 40,123 0 has a code block 210 23,456" in found
    none = words(write_data_report(tmp_path / "none", replace(result, giveaways=())))
    assert "Giveaways" in found and "Giveaways" not in none and "the same side" not in none


def test_a_clean_check_of_data_is_a_page_too(tmp_path: Path) -> None:
    result = examples.data_result(estimate=False)
    clean = replace(
        result, errors=(), warnings=(), warning_counts={}, refusals=(), bad_rows=0, sources={}
    )
    text = words(write_data_report(tmp_path, clean))
    assert "Training would take these files." in text
    assert "None: every row can be trained on." in text and "GiB" not in text


def test_data_without_a_good_row_makes_a_page(tmp_path: Path) -> None:
    none = examples.no_lengths()
    lengths = dict.fromkeys(examples.FIELDS, none)
    result = replace(
        examples.data_result(),
        **{"ids": lengths, "characters": lengths, "pairs": 0, "tokens": 0, "share_ratio": 0.0},
        **{"packs": 0, "steps": 0, "fill": 0.0, "chosen_longer": 0.0},
    )
    assert "<svg class" not in write_data_report(tmp_path, result).read_text(encoding="utf-8")


def test_reports_need_no_torch() -> None:
    from commands import run

    code = (
        "import sys; from polar_xtuner.report import "
        "write_data_report, write_evaluation_report, write_run_report; "
        "print([m for m in ('torch', 'transformers', 'mmengine') if m in sys.modules])"
    )
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"
