"""Published preference data in, rows out: exactly these, and the rest counted."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from hypothesis import given
from hypothesis import strategies as st

from polar_xtuner.preference_formats import FORMATS, describe
from polar_xtuner.preference_rows import convert
from polar_xtuner.records import BadRow, BadRowsError, Row, read_rows
from polar_xtuner.row_files import write_rows

Raw = dict[str, Any]


def user(text: str) -> Raw:
    return {"role": "user", "content": text}


def assistant(text: str) -> Raw:
    return {"role": "assistant", "content": text}


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def row(prompt: Any, reference: str, chosen: Any, rejected: Any, **fields: Any) -> Raw:
    def messages(answer: Any) -> Any:
        return [assistant(answer)] if isinstance(answer, str) else answer

    return {
        "prompt": [user(prompt)] if isinstance(prompt, str) else prompt,
        "reference": [assistant(reference)],
        "chosen": messages(chosen),
        "rejected": messages(rejected),
        **fields,
    }


REFERENCES = [
    {"prompt": "Capital of China?", "reference": "REF China"},
    {"prompt": [user("Capital of France?")], "reference": [assistant("REF France")]},
    {"instruction": "2 + 2?", "output": "REF sum", "generator": "gpt"},
]

TALK = "\n\nHuman: Hi\n\nAssistant: Hello: yes?\n\nHuman: 3 + 3?"
UF = {"overall_score": 5.0, "fine-grained_score": 2.0}

CASES: dict[str, tuple[list[Raw], dict[str, str], list[Raw], dict[str, int]]] = {
    "hh-rlhf": (
        [
            {
                "chosen": "\n\nHuman: Capital of China?\n\nAssistant: Beijing.",
                "rejected": "\n\nHuman: Capital of China?\n\nAssistant: Shanghai.",
            },
            {
                "chosen": f"{TALK}\n\nAssistant: 4",
                "rejected": f"{TALK}\n\nAssistant:",
            },
            {
                "chosen": "\n\nHuman: Capital of China?\n\nAssistant: Beijing.",
                "rejected": "\n\nHuman: Capital of China?\n\nAssistant: Beijing.",
            },
        ],
        {"reference": "file"},
        [row("Capital of China?", "REF China", "Beijing.", "Shanghai.", source="hh-rlhf")],
        {
            "prompts without a reference in the file of references": 1,
            "answers that repeat another one to their prompt": 1,
            "prompts with fewer than two different answers": 1,
        },
    ),
    "ultrafeedback": (
        [
            {
                "source": "evol_instruct",
                "instruction": "Capital of China?",
                "models": ["a", "b", "c", "d"],
                "completions": [
                    {"model": "a", "response": "Shanghai.", **UF, "overall_score": 2.0},
                    {"model": "b", "response": "Beijing.", **UF, "overall_score": 9.0},
                    {"model": "c", "response": "It is Beijing.", **UF, "overall_score": 7.5},
                    {"model": "d", "response": "Wuhan?", **UF, "overall_score": None},
                ],
            },
            {
                "source": "flan",
                "instruction": "Equal?",
                "completions": [{"response": text, **UF} for text in "abc"],
            },
        ],
        {},
        [
            row(
                *("Capital of China?", "Beijing.", "It is Beijing.", "Shanghai."),
                source="evol_instruct",
            )
        ],
        {"answers without a score": 1, "prompts whose answers have equal scores": 1},
    ),
    "ultrafeedback-binarized": (
        [
            {
                "prompt": "Capital of China?",
                "prompt_id": "abc",
                "chosen": [user("Capital of China?"), assistant("Beijing.")],
                "rejected": [user("Capital of China?"), assistant("Shanghai.")],
                "messages": [user("Capital of China?"), assistant("Beijing.")],
                "score_chosen": 8.0,
                "score_rejected": 5.0,
            },
            {
                "prompt": "Capital of China?",
                "prompt_id": "abd",
                "chosen": [user("Capital of China?"), assistant("Beijing.")],
                "rejected": [user("Capital of China?"), assistant("Peking.")],
                "score_chosen": 8.0,
                "score_rejected": 8.0,
            },
        ],
        {"reference": "file"},
        [
            row(
                *("Capital of China?", "REF China", "Beijing.", "Shanghai."),
                source="ultrafeedback-binarized",
                id="abc",
            )
        ],
        {"prompts whose answers have equal scores": 1},
    ),
    "helpsteer": (
        [
            {"prompt": "2 + 2?", "response": "5", "helpfulness": 0, "correctness": 4},
            {"prompt": "2 + 2?", "response": "4", "helpfulness": 3, "correctness": 0},
            {
                "prompt": "Hi<extra_id_1>Assistant\nHello<extra_id_1>User\nBye",
                "response": "Bye.",
                "helpfulness": 4,
            },
            {"prompt": "2 + 2?", "response": "alone", "helpfulness": 1},
            {
                "prompt": "Capital of France?",
                "response_1": "Paris.",
                "response_2": "Rome.",
                "preference_strength": -2,
            },
        ],
        {"reference": "file"},
        [
            row("2 + 2?", "REF sum", "4", "5", source="helpsteer"),
            row("Capital of France?", "REF France", "Paris.", "Rome.", source="helpsteer"),
        ],
        {
            "prompts without a reference in the file of references": 1,
            "prompts with fewer than two different answers": 1,
        },
    ),
    "alpaca-eval": (
        [
            {
                "instruction": "2 + 2?",
                "output_1": "5",
                "generator_1": "gpt4",
                "output_2": "4",
                "generator_2": "mine",
                "annotator": "gpt4",
                "preference": 1.9,
            },
            {"instruction": "2 + 2?", "output_1": "4", "output_2": "5", "preference": 1.0},
            {"instruction": "2 + 2?", "output_1": "4", "output_2": "5", "preference": 1.5},
            {"instruction": "2 + 2?", "output_1": "4", "output_2": "5", "preference": None},
        ],
        {"reference": "file"},
        [row("2 + 2?", "REF sum", "4", "5", source="alpaca-eval")] * 2,
        {
            "prompts whose answers have equal scores": 1,
            "answers without a score": 2,
            "prompts with fewer than two different answers": 1,
        },
    ),
    "trl": (
        [
            {"prompt": "2 + 2?", "chosen": " 4", "rejected": " 5", "gold": "four"},
            {"chosen": "The sky is blue.", "rejected": "The sky is green.", "gold": "blue"},
            {
                "chosen": [user("2 + 2?"), assistant("4")],
                "rejected": [user("2 + 2?"), assistant("5")],
                "gold": [assistant("four")],
            },
            {
                "prompt": [user("2 + 2?")],
                "chosen": [assistant("4"), user("Sure?"), assistant("Yes")],
                "rejected": [assistant("5")],
                "gold": "four",
                "id": 7,
            },
        ],
        {"reference": "field:gold"},
        [
            row("2 + 2?", "four", " 4", " 5", source="trl"),
            row("The sky is", "blue", " blue.", " green.", source="trl"),
            row("2 + 2?", "four", "4", "5", source="trl"),
            row(
                *("2 + 2?", "four", [assistant("4"), user("Sure?"), assistant("Yes")], "5"),
                source="trl",
                id="7",
            ),
        ],
        {},
    ),
    "ranked": (
        [
            {"prompt": "2 + 2?", "responses": ["4", "four", "5", "6"], "source": "mine"},
            {"prompt": [user("Hi")], "responses": ["c", "a", "b"], "scores": [1, 3, "2"]},
            {"prompt": "two", "responses": ["4", "5"]},
            {"prompt": "same", "responses": ["4", "4", "5"]},
        ],
        {},
        [
            row("2 + 2?", "4", "four", "5", source="mine"),
            row("Hi", "a", "b", "c", source="ranked"),
        ],
        {
            "prompts with fewer than three different answers, the best for the reference": 2,
            "answers that repeat another one to their prompt": 1,
        },
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_exactly_its_rows(name: str, tmp_path: Path) -> None:
    records, options, expected, dropped = CASES[name]
    file = lines(tmp_path / "in.jsonl", records)
    if options.get("reference") == "file":
        options = {"reference": f"file:{lines(tmp_path / 'refs.jsonl', REFERENCES)}"}
    rows = convert([file], name, **options)
    assert write_rows(rows, tmp_path / "out.jsonl") == len(expected)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == expected
    assert rows.dropped == dropped
    assert all(isinstance(r, Row) for r in read_rows([tmp_path / "out.jsonl"]))


TURNS = [user("Sum?"), assistant("Of?"), user("2 + 2?")]


@pytest.mark.parametrize(
    ("prompt", "history", "kept"),
    [
        ("2 + 2?", [user("2 + 2?")], [user("2 + 2?")]),
        ("2 + 2?\n", [{"role": "system", "content": "Be brief."}, user("2 + 2?")], None),
        ("2 + 2?", TURNS, TURNS),
        ("Sum?", TURNS, TURNS),
        ("Sum?\nOf?\n2 + 2?", TURNS, TURNS),
        ([{**user("2 + 2?"), "name": "me"}], [user("2 + 2?")], [user("2 + 2?")]),
        ("2 + 2?", "2 + 2?", [user("2 + 2?")]),
        ([user("2 + 2?")], "2 + 2?", [user("2 + 2?")]),
    ],
)
def test_a_prompt_that_stands_in_the_answers_too_is_taken_off(
    prompt: Any, history: Any, kept: list[Raw] | None, tmp_path: Path
) -> None:
    answers = (" 4", " 5") if isinstance(history, str) else ([assistant("4")], [assistant("5")])
    chosen, rejected = (history + answer for answer in answers)
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "gold": "four"}
    [read] = convert([lines(tmp_path / "in.jsonl", [record])], "trl", reference="field:gold")
    assert read == row(kept or history, "four", *answers, source="trl")


def test_an_answer_that_repeats_a_word_or_alone_repeats_the_prompt_is_left(tmp_path: Path) -> None:
    records = [
        {"prompt": "Hello", "chosen": "Hello!", "rejected": "Hello, you.", "gold": "Hi"},
        {"prompt": "2 + 2?", "chosen": "2 + 2? 4", "rejected": "5", "gold": "4"},
    ]
    rows = convert([lines(tmp_path / "in.jsonl", records)], "trl", reference="field:gold")
    texts = [(r["chosen"], r["rejected"]) for r in rows if isinstance(r, dict)]
    assert texts == [([assistant(r["chosen"])], [assistant(r["rejected"])]) for r in records]


def test_all_pairs_are_those_of_different_scores(tmp_path: Path) -> None:
    record = {"prompt": "p", "responses": [*"abcde"], "scores": [9, 7, 5, 5, 1]}
    file = lines(tmp_path / "in.jsonl", [record])
    rows = convert([file], "ranked", pairs="all")
    write_rows(rows, tmp_path / "out.jsonl", several=True)
    read = [r for r in read_rows([tmp_path / "out.jsonl"]) if isinstance(r, Row)]
    pairs = {(c, r) for one in read for c in one.chosen for r in one.rejected}
    assert pairs == {("b", "c"), ("b", "d"), ("b", "e"), ("c", "e"), ("d", "e")}
    assert {one.reference for one in read} == {"a"}


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3)), max_size=6))
def test_no_pair_prefers_what_scored_less(answers: list[tuple[str, int]]) -> None:
    record = {
        "prompt": "p",
        "gold": "g",
        "responses": [text for text, _ in answers],
        "scores": [score for _, score in answers],
    }
    best: dict[str, int] = {}
    for text, score in answers:
        best[text] = max(best.get(text, 0), score)
    for pairs in ("paper", "all"):
        conversion = convert([], "ranked", reference="field:gold", pairs=pairs)
        rows = conversion._rows_of(FORMATS["ranked"].read(record, None))
        found = [
            (one["chosen"][0]["content"], worse[0]["content"])
            for one in rows
            for worse in (one["rejected"] if pairs == "all" else [one["rejected"]])
        ]
        assert all(best[better] > best[worse] for better, worse in found)
        if pairs == "all":
            assert len(found) == sum(best[a] > best[b] for a in best for b in best)
        assert bool(rows) <= bool(answers)


def test_other_scores_can_be_ranked_by(tmp_path: Path) -> None:
    records, _, _, _ = CASES["helpsteer"]
    file = lines(tmp_path / "in.jsonl", records[:2])
    refs = f"file:{lines(tmp_path / 'refs.jsonl', REFERENCES)}"
    [read] = convert([file], "helpsteer", reference=refs, score="correctness")
    assert isinstance(read, dict)
    assert read["chosen"] == [assistant("5")]
    for preferences, named in ((records[:2], "clarity"), (records[-1:], "helpfulness")):
        lines(file, preferences)
        bad = next(iter(convert([file], "helpsteer", reference=refs, score=named)))
        assert isinstance(bad, BadRow)
        assert bad.errors[0].field == named


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_score_that_is_not_a_number_is_as_good_as_none(ending: str, tmp_path: Path) -> None:
    scores = [2.0, float("nan"), 1.0, None, 3.0]
    records = [{"prompt": "p", "response": t, "helpfulness": s} for t, s in zip("abcde", scores)]
    file = tmp_path / f"in.{ending}"
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), file)
    else:
        lines(file, records)
    rows = convert([file], "helpsteer")
    assert [*rows] == [row("p", "e", "a", "c", source="helpsteer")]
    assert rows.dropped == {"answers without a score": 2}


@pytest.mark.parametrize(
    ("name", "record", "field"),
    [
        ("hh-rlhf", {"chosen": "\n\nHuman: a\n\nAssistant: b"}, "rejected"),
        ("hh-rlhf", {"chosen": "Beijing.", "rejected": "Shanghai."}, "chosen"),
        (
            "hh-rlhf",
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b",
                "rejected": "\n\nHuman: c\n\nAssistant: b",
            },
            "rejected",
        ),
        ("hh-rlhf", {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "chosen"),
        ("ultrafeedback", {"instruction": "a", "completions": "b"}, "completions"),
        ("ultrafeedback", {"instruction": "a", "completions": ["b"]}, "completions[0]"),
        (
            "ultrafeedback",
            {"instruction": "a", "completions": [{"response": "b"}]},
            "completions[0].overall_score",
        ),
        (
            "ultrafeedback",
            {"instruction": "a", "completions": [{"overall_score": 3}]},
            "completions[0].response",
        ),
        ("ultrafeedback", {"prompt": "a", "chosen": [], "rejected": []}, "completions"),
        ("ultrafeedback-binarized", {"instruction": "a", "completions": []}, "chosen"),
        ("ultrafeedback-binarized", {"chosen": "a", "rejected": "b"}, "chosen"),
        ("helpsteer", {"prompt": "a", "response": "b"}, "helpfulness"),
        ("helpsteer", {"prompt": "a", "response": "b", "helpfulness": "good"}, "helpfulness"),
        ("helpsteer", {"prompt": 5, "response": "b", "helpfulness": 1}, "prompt"),
        ("alpaca-eval", {"instruction": "a", "output": "b", "generator": "c"}, "output_1"),
        (
            "alpaca-eval",
            {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 3},
            "preference",
        ),
        ("trl", {"prompt": "a", "chosen": "b"}, "rejected"),
        ("trl", {"prompt": "a", "chosen": "b", "rejected": [assistant("c")]}, "rejected"),
        ("trl", {"chosen": "b", "rejected": "c"}, "rejected"),
        ("trl", {"prompt": "a", "chosen": [user("b")], "rejected": [assistant("c")]}, "rejected"),
        (
            "trl",
            {"prompt": "a", **{n: [user("b"), assistant(n)] for n in ("chosen", "rejected")}},
            "prompt",
        ),
        ("ranked", {"prompt": "a", "responses": ["b", 7]}, "responses[1]"),
        ("ranked", {"prompt": "a", "responses": ["b", "c"], "scores": [1]}, "scores"),
        ("ranked", {"prompt": "a", "responses": ["b"], "scores": [float("inf")]}, "scores[0]"),
        ("ranked", {"prompt": "a", "responses": ["b"], "scores": [-(10**400)]}, "scores[0]"),
        ("ranked", {"prompt": "a", "responses": ["b"], "scores": ["9" * 400]}, "scores[0]"),
        ("ranked", ["a"], "row"),
        ("ranked", {"prompt": "", "responses": [*"abc"]}, "prompt"),
    ],
)
def test_a_wrong_record_is_refused_by_file_line_and_field(
    name: str, record: Any, field: str, tmp_path: Path
) -> None:
    good = CASES[name][0][0]
    file = lines(tmp_path / "in.jsonl", [good, record])
    reference = None if name in ("ranked", "ultrafeedback", "helpsteer") else "field:gold"
    rows = convert([file], name, reference=reference)
    found = [r.errors[0] for r in rows if isinstance(r, BadRow)]
    assert (found[-1].file, found[-1].line, found[-1].field) == (str(file), 2, field)
    with pytest.raises(BadRowsError):
        write_rows(rows, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if kind.has_pairs])
@pytest.mark.parametrize("reference", [None, "best"])
def test_pairs_need_a_reference_that_is_named(name: str, reference: str | None) -> None:
    with pytest.raises(ValueError, match=r"--reference field:NAME.*--reference file:PATH"):
        convert([], name, reference=reference)


def test_an_answer_that_is_the_named_reference_makes_no_pair(tmp_path: Path) -> None:
    records = [
        {"prompt": "p", "responses": [*"abc"], "gold": [assistant("a")]},
        {"prompt": "p", "responses": [*"abc"], "gold": "d"},
        {"prompt": "p", "responses": [*"ab"], "gold": "b"},
    ]
    rows = convert([lines(tmp_path / "in.jsonl", records)], "ranked", reference="field:gold")
    made = [row("p", "a", "b", "c", source="ranked"), row("p", "d", "a", "b", source="ranked")]
    assert [*rows] == made
    assert rows.dropped == {
        "answers that are the reference": 2,
        "prompts with fewer than two different answers": 1,
    }


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, kind in FORMATS.items() for field in kind.own]
)
def test_the_prompt_and_the_answers_are_no_reference(name: str, field: str) -> None:
    with pytest.raises(ValueError, match=f"--reference field:{field}: is the prompt or an answer"):
        convert([], name, reference=f"field:{field}")


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        ([], "holds no row"),
        ([{"prompt": "a"}], ":1: reference: is missing"),
        ([{"prompt": "a", "reference": "b"}, {"prompt": "a", "reference": "c"}], ":2:.*:1"),
        ([["a"]], ":1: row: must be an object"),
    ],
)
def test_a_file_of_references_is_checked(records: list[Any], problem: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "refs.jsonl", records)
    with pytest.raises(ValueError, match=problem):
        convert([], "trl", reference=f"file:{file}")


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_rows_are_the_same_in_every_kind_of_file(ending: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "in.jsonl", CASES["ranked"][0])
    for pairs in ("paper", "all"):
        out = tmp_path / f"{pairs}.{ending}"
        write_rows(convert([file], "ranked", pairs=pairs), out, several=pairs == "all")
        read = [r for r in read_rows([out]) if isinstance(r, Row)]
        plain = tmp_path / f"{pairs}.plain.jsonl"
        write_rows(convert([file], "ranked", pairs=pairs), plain, several=pairs == "all")
        expected = [r for r in read_rows([plain]) if isinstance(r, Row)]
        texts = [(r.prompt, r.reference, r.chosen, r.rejected, r.source) for r in read]
        assert texts == [(r.prompt, r.reference, r.chosen, r.rejected, r.source) for r in expected]
        assert len(texts) >= 2
    if ending == "jsonl.gz":
        assert gzip.open(out).read(1)


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("before")

    def rows() -> Any:
        yield CASES["ranked"][2][0]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_rows(rows(), out)
    assert out.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    with pytest.raises(ValueError, match=r"\.jsonl or \.jsonl\.gz or \.parquet"):
        write_rows(rows(), tmp_path / "out.csv")


def test_memory_does_not_grow_with_the_records(tmp_path: Path) -> None:
    refs = lines(
        tmp_path / "refs.jsonl", [{"prompt": f"{i}", "reference": "r" * 500} for i in range(4000)]
    )

    text = "c" * 500
    records = [{"prompt": f"{i}", "chosen": text, "rejected": "d"} for i in range(4000)]
    file = lines(tmp_path / "in.jsonl", records)
    del records
    tracemalloc.start()
    try:
        for _ in convert([file], "trl", reference=f"file:{refs}"):
            pass
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < (file.stat().st_size + refs.stat().st_size) / 8


def test_the_guide_explains_every_format() -> None:
    guide = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` | {describe(name)} |" in guide for name in FORMATS)


@pytest.fixture(scope="module")
def tool() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("convert", ROOT / "tools" / "convert_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool_tells_rows_and_what_was_left_out(
    tool: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run: Callable[..., None] = lambda *args: (  # noqa: E731
        monkeypatch.setattr(sys, "argv", ["convert_data.py", *map(str, args)]),
        tool.main(),
    )
    file, out = lines(tmp_path / "in.jsonl", CASES["ranked"][0]), tmp_path / "out.jsonl"
    run(file, "--from", "ranked", "--output", out, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "rows": 2,
        "output": str(out),
        "bad_rows": 0,
        "dropped": CASES["ranked"][3],
    }
    run(file, "--from", "ranked", "--output", out)
    assert "left out: 2 prompts with fewer than three" in capsys.readouterr().out
    wrong = lines(tmp_path / "wrong.jsonl", [{"prompt": "p"}])
    mixed = ["--from", "ranked", "--on-bad-row", "skip", "--json"]
    run(file, wrong, *mixed, "--output", out)
    assert json.loads(capsys.readouterr().out)["bad_rows"] == 1
    for arguments, message in (
        (
            [wrong, "--from", "ranked"],
            rf"{wrong}:1: responses: is missing\n.* --on-bad-row skip\.$",
        ),
        ([file, "--from", "ranked", "--reference", "file:no.jsonl"], "--reference file:no.jsonl: "),
        ([file, "--from", "trl"], "is named|Name one"),
        ([file, "--from", "ranked", "--score", "x"], "has no scores"),
        ([file, "--from", "ranked", "--reference", "worst"], "must be best, field:NAME"),
    ):
        with pytest.raises(SystemExit, match=message) as raised:
            run(*arguments, "--output", tmp_path / "x.jsonl")
        assert str(raised.value).startswith("convert_data.py: ")
    with pytest.raises(SystemExit) as raised:
        run(file, "--from", "ranked", "--ability", "x", "--output", out)
    assert raised.value.code == 2


@pytest.mark.parametrize("way", ["from", "verl", "reference", "link", "folder", "is a folder"])
def test_the_tool_never_writes_over_what_it_reads(
    way: str, tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = lines(tmp_path / "in.jsonl", CASES["ranked"][0])
    refs = lines(tmp_path / "refs.jsonl", REFERENCES)
    rows = tmp_path / "rows.parquet"
    write_rows(CASES["ranked"][2], rows)
    link = tmp_path / "link.jsonl"
    link.symlink_to(file)
    (tmp_path / "folder.jsonl").mkdir()
    spelled = tmp_path / "folder.jsonl" / ".."
    ranked = ["--from", "ranked"]
    arguments, output = {
        "from": ([file, *ranked], spelled / "in.jsonl"),
        "verl": ([rows, "--to", "verl-parquet"], spelled / "rows.parquet"),
        "reference": ([file, *ranked, "--reference", f"file:{refs}"], spelled / "refs.jsonl"),
        "link": ([link, *ranked], file),
        "folder": ([tmp_path, *ranked], file),
        "is a folder": ([file, *ranked], tmp_path / "folder.jsonl"),
    }[way]
    before = {path: path.read_bytes() for path in (file, refs, rows)}
    monkeypatch.setattr(
        sys, "argv", [*map(str, ["convert_data.py", *arguments, "--output", output])]
    )
    with pytest.raises(SystemExit, match=f"{output} is (read too|a folder)"):
        tool.main()
    assert {path: path.read_bytes() for path in (file, refs, rows)} == before
