"""`tools/check_data.py` and what is behind it: planted faults, real data, and training's own word.

Whether a row is clean is judged here by plain code that shares nothing with the code under test.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT

from polar_xtuner.data_checks import KINDS, special_strings
from polar_xtuner.data_result import DataResult
from polar_xtuner.data_survey import PUBLISHED_LIMITS, lengths_of, survey
from polar_xtuner.template import PolarTemplate
from polar_xtuner.tokenizer import load_tokenizer

DATA_SETS = ("gsm8k", "pandalm", "mt_bench", "arena_hard")
SIDES = ("prompt", "reference", "chosen", "rejected")

Raw = dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint(internlm2_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with InternLM2's tokenizer, as a checkpoint has it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    internlm2_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return load_tokenizer(checkpoint)


def checked(tokenizer: Any, *files: Path, **changes: Any) -> DataResult:
    limits = replace(PUBLISHED_LIMITS, **changes)
    template = template_of(tokenizer, limits.max_length, limits.max_response_length)
    return survey(files, template, special_strings(tokenizer), limits, num_proc=1)


@lru_cache
def template_of(tokenizer: Any, *lengths: int) -> PolarTemplate:
    return PolarTemplate(tokenizer, *lengths)  # which takes seconds


def findings(result: DataResult) -> list[tuple[str, str, int, str]]:
    """Kind, file, line and field."""
    warnings = [(w.kind, w.file, w.line, w.field) for w in result.warnings]
    return warnings + [("error", e.file, e.line, e.field) for e in result.errors]


# Planted faults: every one is found as its kind where it is, and nothing else

MARKS = (
    *("<|", "|>", "<s>", "</s>", "<unk>", "INST]", "SYS>", "_of_turn", "UNUSED_TOKEN"),
    *("think>", "&amp;", "&lt;", "&gt;", "&quot;", "&nbsp;", "&#", "\\n", "Human:", "Assistant:"),
    *("###", "None", "null"),
)
MOST = 900
"""Bytes of a text, so that no limit of the test is met: every id is of a byte at least."""


def is_clean(row: Raw) -> bool:
    """By brute force; stricter than need be."""
    texts = {side: "\n".join(m["content"] for m in row[side]) for side in SIDES}
    roles = [[m["role"] for m in row[side]] for side in SIDES]
    flat = {side: " ".join(text.split()).lower() for side, text in texts.items()}
    return (
        all(0 < len(text) < MOST and len(flat[side]) > 3 for side, text in texts.items())
        and all(c == "\n" or " " <= c <= "~" for text in texts.values() for c in text)
        and not any(mark in text for mark in MARKS for text in texts.values())
        and len({flat["reference"], flat["chosen"], flat["rejected"]}) == 3
        and not any(flat[side].startswith(flat["prompt"]) for side in SIDES[1:])
        and roles == [["user"]] + [["assistant"]] * 3
    )


def clean_rows(folder: Path) -> list[Raw]:
    """Clean rows of the real data, without pairs that come again either way."""
    rows: list[Raw] = []
    seen: set[tuple[str, ...]] = set()
    for name in DATA_SETS:
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            prompt, reference, chosen, rejected = (row[side][0]["content"] for side in SIDES)
            answers = [chosen, rejected]
            pair = (prompt, reference, *sorted(answers))
            if is_clean(row) and pair not in seen:
                seen.add(pair)
                rows.append(row)
    return rows


ORDINARY = (
    r"Let $\nu>0$ and $\nabla f\neq 0$.",
    r"They are in C:\new\names.",
    r'printf "a\nb\n"',
    "La lettre «\u00a0Â\u00a0», ou “Â”",
    "<p>a &lt; b</p>",
    "`a &lt; b`",
    "f <|x|> g",
)
"""What looks like a fault and is none."""


def ordinary_rows() -> list[Raw]:
    texts = dict(zip(SIDES, ("Write what you like, please.", "Well.", "", "I had rather not.")))
    rows = [{**texts, "chosen": answer} for answer in ORDINARY]
    return [
        {side: said("assistant" if n else "user", row[side]) for n, side in enumerate(SIDES)}
        for row in rows
    ]


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def text(row: Raw, side: str) -> str:
    return str(row[side][0]["content"])


def put(side: str, change: Callable[[str], str]) -> Callable[[Raw], None]:
    def plant(row: Raw) -> None:
        row[side][0]["content"] = change(text(row, side))

    return plant


def take(side: str, other: str) -> Callable[[Raw], None]:
    def plant(row: Raw) -> None:
        row[side] = said("assistant", text(row, other))

    return plant


def several(row: Raw) -> None:
    row["rejected"] = [text(row, "rejected"), "Something else.", text(row, "rejected")]


def equal_once_cut(row: Raw) -> None:
    head = "word " * 1100
    row["chosen"], row["rejected"] = said("assistant", head + "a"), said("assistant", head + "b")


def as_is(row: Raw) -> None:
    pass


def swapped(row: Raw) -> None:
    row["chosen"], row["rejected"] = row["rejected"], row["chosen"]


ERRORS: dict[str, tuple[str, Callable[[Raw], None]]] = {
    "missing": ("reference", lambda row: row.pop("reference")),
    "equal": ("chosen", take("rejected", "chosen")),
    "no prompt": ("prompt", lambda row: row.update(prompt="")),
    "margin": ("margin", lambda row: row.update(margin=float("nan"))),
    "wrapper": ("wrapper", lambda row: row.update(wrapper="chat")),
    "surrogate": ("rejected[0].content", put("rejected", lambda t: t + "\ud800")),
    "number": ("chosen[0].content", lambda row: row["chosen"][0].update(content=7)),
    "no message": ("chosen", lambda row: row.update(chosen=[])),
    "equal once cut": ("chosen", equal_once_cut),
}
"""Field and fault of rows that training refuses; two more are not JSON objects at all."""

WARNINGS: dict[str, tuple[str, Callable[[Raw], None]]] = {
    "chosen_is_reference": ("chosen", take("chosen", "reference")),
    "rejected_is_reference": ("rejected", take("rejected", "reference")),
    "special_token": ("chosen", put("chosen", lambda t: t + "</s>")),
    "chat_mark": ("prompt", put("prompt", lambda t: f"<|im_start|>user\n{t}")),
    "replacement_character": ("prompt", put("prompt", lambda t: f"\ufffd{t}")),
    "mojibake": ("reference", put("reference", lambda t: f"It\u00e2\u20ac\u2122s: {t}")),
    "empty": ("rejected", put("rejected", lambda t: " ")),
    "placeholder": ("rejected", put("rejected", lambda t: "None")),
    "cut": ("rejected", put("rejected", lambda t: "tediously " * 1100)),
    "think_tag": ("chosen", put("chosen", lambda t: f"<think>Well.</think>{t}")),
    "near_equal": ("rejected", lambda row: row.update(rejected=text(row, "chosen") + "\n")),
    "role": ("reference", lambda row: row["reference"][0].update(role="user")),
    "control_character": ("chosen", put("chosen", lambda t: f"{t}\x00")),
    "html_entity": ("prompt", put("prompt", lambda t: f"{t} &amp;")),
    "negative_margin": ("margin", lambda row: row.update(margin=-1)),
    "misspelled_field": ("Margin", lambda row: row.update(Margin=1)),
    "repeated_candidate": ("rejected[2]", several),
    "escaped_newlines": ("chosen", lambda row: row.update(chosen="First.\\n\\nSecond.")),
    "prompt_in_answer": (
        "chosen",
        lambda row: row.update(chosen=f"{text(row, 'prompt')}\n{text(row, 'chosen')}"),
    ),
}
"""Field and fault of rows that training takes."""

AGAIN: dict[str, tuple[str, Callable[[Raw], None]]] = {
    "duplicate": ("row", as_is),
    "contradiction": ("chosen", swapped),
    "other_wrapper": ("wrapper", lambda row: row.update(wrapper="pretrain")),
}
"""Field and fault of a second row made of a sound one."""

EACH = 7


def planted(rows: list[Raw], files: list[Path]) -> set[tuple[str, str, int, str]]:
    """Write the rows, `EACH` of every fault among them; where the faults are."""
    rng = random.Random(7)
    one_a_prompt = {text(row, "prompt"): number for number, row in enumerate(rows)}
    numbers = rng.sample(sorted(one_a_prompt.values()), len(one_a_prompt))
    faults: dict[int, tuple[str, str]] = {}
    lines: dict[int, list[str]] = {}
    for kind, field, plant in (
        *(("error", field, plant) for field, plant in ERRORS.values()),
        *((kind, field, plant) for kind, (field, plant) in WARNINGS.items()),
    ):
        for _ in range(EACH):
            number = numbers.pop()
            plant(rows[number])
            faults[number] = kind, field
    for field, spoil in (
        ("row", lambda line: line[:-9]),
        ("prompt", lambda line: line[:-1] + ', "prompt": "again"}'),
    ):
        for _ in range(EACH):
            number = numbers.pop()
            lines[number] = [spoil(json.dumps(rows[number]))]
            faults[number] = "error", field
    texts = [lines.get(number, [json.dumps(row)])[0] for number, row in enumerate(rows)]
    marked = [(line, faults.get(number)) for number, line in enumerate(texts)]
    for kind, (field, change) in AGAIN.items():
        for _ in range(EACH):
            row = json.loads(texts[numbers.pop()])
            change(row)
            marked.insert(
                rng.randrange(len(rows), len(marked) + 1), (json.dumps(row), (kind, field))
            )
    where = set()
    for number, file in enumerate(files):
        part = np.array_split(np.arange(len(marked)), len(files))[number].tolist()
        file.write_text("".join(f"{marked[i][0]}\n" for i in part), encoding="utf-8")
        for line, i in enumerate(part, 1):
            if (fault := marked[i][1]) is not None:
                where.add((fault[0], str(file), line, fault[1]))
    return where


def test_every_planted_fault_is_found_and_nothing_else(
    shared_data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    rows = clean_rows(shared_data) + ordinary_rows()
    count = len(rows)
    faults = planted(rows, files)
    kinds = len(ERRORS) + 2 + len(WARNINGS) + len(AGAIN)
    assert len(faults) == EACH * kinds >= 200
    result = checked(tokenizer, *files, max_length=2500, max_response_length=1024)
    found = findings(result)
    assert sorted(set(found) - faults) == []  # no false alarm, on clean rows or others
    assert sorted(faults - set(found)) == []
    assert len(found) == len(faults)
    assert count - len(faults) > 1000
    assert result.bad_rows == EACH * (len(ERRORS) + 2)
    assert result.rows == count + EACH * len(AGAIN)
    assert result.warning_counts == dict.fromkeys([*WARNINGS, *AGAIN], EACH)
    assert set(WARNINGS) | set(AGAIN) == set(KINDS)


# The real data: what is found is what plain code finds


def plain_findings(file: Path, tokenizer: Any) -> Iterator[tuple[str, str, int, str]]:
    for line, data in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(data)
        texts = {side: "\n".join(m["content"] for m in row[side]) for side in SIDES}
        answers = {side: texts[side] for side in SIDES[1:]}
        for side in ("chosen", "rejected"):
            if texts[side] == texts["reference"]:
                yield f"{side}_is_reference", str(file), line, side
        for side, answer in answers.items():
            if answer.strip().startswith(texts["prompt"].strip()):
                yield "prompt_in_answer", str(file), line, side
            if "\n\nHuman: " in answer:
                yield "chat_mark", str(file), line, side
            if len(tokenizer.encode(answer, add_special_tokens=False).ids) > 4095:
                yield "cut", str(file), line, side
        for side, content in texts.items():
            if "\ufffd" in content:
                yield "replacement_character", str(file), line, side
            if content.count("\\n") > 1 and len(content.splitlines()) == 1:
                yield "escaped_newlines", str(file), line, side


@pytest.mark.parametrize(
    ("name", "rows", "groups", "counts"),
    [
        ("gsm8k", 1988, 598, {"chosen_is_reference": 3}),
        ("pandalm", 649, 132, {"chosen_is_reference": 6, "prompt_in_answer": 2}),
        ("mt_bench", 274, 138, {"chosen_is_reference": 4, "chat_mark": 1}),
        (
            *("arena_hard", 390, 390),
            {"replacement_character": 1, "escaped_newlines": 2, "cut": 1},
        ),
    ],
)
def test_real_data_have_the_findings_that_plain_code_finds(
    name: str,
    rows: int,
    groups: int,
    counts: dict[str, int],
    shared_data: Path,
    tokenizer: Any,
) -> None:
    file = shared_data / f"{name}.jsonl"
    result = checked(tokenizer, file)
    assert (result.rows, result.groups, result.pairs, result.errors) == (rows, groups, rows, ())
    assert not result.refused
    assert result.warning_counts == counts
    assert sorted(findings(result)) == sorted(plain_findings(file, tokenizer))
    assert 0.5 < result.fill <= 1
    assert result.packs == result.steps


# What training says of the same rows


@pytest.fixture(scope="module")
def small_checkpoint(demo_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    demo_tokenizer.save_pretrained(folder)
    return folder


def test_special_tokens_are_those_of_the_tokenizer(
    demo_tokenizer: Any, small_checkpoint: Path
) -> None:
    expected = {"<unk>", "<s>", "</s>", "<|reward|>", "[UNUSED_TOKEN_130]"}
    assert special_strings(demo_tokenizer) == expected
    assert special_strings(load_tokenizer(small_checkpoint)) == expected


SMALL = {"max_length": 120, "max_response_length": 40, "max_packed_length": 200}


def some_rows(count: int) -> list[Raw]:
    rng = random.Random(1)
    words = "one two three four five six seven eight nine ten".split()

    def some(most: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randrange(1, most)))

    rows = []
    for number in range(count):
        answers = {f"{some(30)} {i}" for i in range(rng.randrange(2, 5))}
        first, *others = sorted(answers)
        row = {"prompt": f"{some(20)} {number // 3}", "reference": f"{number // 3}"}
        rows.append({**row, "chosen": first, "rejected": others, "source": f"s{number % 2}"})
    return rows


ONE = {"prompt": "p", "reference": "r", "chosen": "c", "rejected": "d"}


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (some_rows(60), {}),
        (some_rows(60), {"ranks": 2, "accumulative_counts": 2}),
        (some_rows(60), {"pairs_per_step": 4}),
        (some_rows(60), {"pairs_per_step": 70}),  # does not fit the packs of a step
        (some_rows(2), {"ranks": 2}),  # one group for two ranks
        ([*some_rows(9), {"prompt": "p"}], {}),
        ([*some_rows(9), {"prompt": "p"}], {"on_bad_row": "skip"}),
        ([{"prompt": "p"}], {"on_bad_row": "skip"}),
        ([ONE, {**ONE, "chosen": "five " * 50 + "a", "rejected": "five " * 50 + "b"}], {}),
        ([ONE, {**ONE, "prompt": "five " * 30}], {"max_packed_length": 60}),
        (
            [ONE, {**ONE, "prompt": "five " * 30}],
            {"max_packed_length": 60, "on_long_group": "skip"},
        ),
        ([{**ONE, "prompt": "five " * 30}], {"max_packed_length": 60, "on_long_group": "skip"}),
        ([{**ONE, "rejected": [f"{n} {n}" for n in range(40)]}], {}),  # a group in parts
    ],
)
def test_files_are_refused_exactly_if_training_refuses_them(
    rows: list[Raw], changes: dict[str, Any], small_checkpoint: Path, tmp_path: Path
) -> None:
    """And otherwise the groups, tokens, packs and steps are training's."""
    from polar_xtuner.dataset import PolarDataset
    from polar_xtuner.packing import plan_epoch

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = load_tokenizer(small_checkpoint)
    result = checked(tokenizer, file, **{**SMALL, **changes})
    limits = result.limits
    shape = {**SMALL, **changes}
    lengths = {name: shape.pop(name) for name in SMALL}
    handling = {n: shape[n] for n in ("on_bad_row", "on_long_group") if n in shape}
    try:
        dataset = PolarDataset(
            tokenizer, str(file), num_proc=1, cache_dir=str(tmp_path / "c"), **lengths, **handling
        )
        plan = plan_epoch(
            dataset.lengths,
            dataset.pair_counts,
            dataset.lengths,
            limits.max_packed_length,
            pairs_per_step=limits.pairs_per_step,
            ranks=limits.ranks,
            accumulation=limits.accumulative_counts,
        )
    except ValueError:
        assert result.refused
        return
    assert not result.refused, result.refusals
    assert result.groups == len(dataset.lengths)
    assert result.pairs == dataset.pair_counts.sum()
    assert result.tokens == dataset.lengths.sum()
    assert result.tokens_alone == dataset.store.unshared_lengths().sum()
    assert result.steps == plan.steps
    assert result.packs == len(plan.ends)
    assert result.rows - result.bad_rows >= dataset.store.meta["rows"] - len(result.errors)


def test_figures_are_those_of_the_rows(small_checkpoint: Path, tmp_path: Path) -> None:
    rows = [
        {**ONE, "chosen": ["longest of all", "c"], "rejected": "dd", "source": "a"},
        {**ONE, "prompt": "pppp", "source": "b"},
        {**ONE, "prompt": "pppp", "rejected": "xx", "source": "b"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = checked(load_tokenizer(small_checkpoint), file, **SMALL)
    assert (result.prompts, result.groups, result.pairs) == (2, 2, 4)
    assert result.sources == {"b": 2, "a": 1}
    chosen = result.characters["chosen"]
    assert (chosen.count, chosen.min, chosen.max, chosen.mean) == (4, 1, 14, 17 / 4)
    assert result.ids["prompt"].count == 3
    assert result.chosen_longer == 1 / 4
    assert result.as_long == 1 / 4  # c and d


def test_statistics_are_numpys_and_bins_double() -> None:
    values = np.random.default_rng(0).integers(0, 3000, 1000)
    lengths = lengths_of(values)
    assert lengths.counts == tuple(np.histogram(values, [*lengths.edges[:-1], 1 << 20])[0])
    assert lengths.edges[:5] == (0, 1, 2, 4, 8)
    assert lengths.mean == pytest.approx(values.mean())
    assert (values <= lengths.p90).mean() >= 0.9 > (values < lengths.p90).mean()
    assert sum(lengths_of(np.array([], int)).counts) == 0


# The tool


def run_without_training(
    folder: Path, *arguments: object, stdout: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """The tool where nothing is installed that only training or evaluation needs."""
    for name in ("torch", "transformers", "xtuner", "mmengine", "datasets", "scipy"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is not there')")
    command = [sys.executable, ROOT / "tools" / "check_data.py", *arguments]
    env = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [str(c) for c in command], stdout=stdout, stderr=subprocess.PIPE, text=True, env=env
    )


def test_the_tool_says_all_in_json_and_the_first_to_people(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    bad = [{**ONE, "prompt": 5}] * 25
    file.write_text("".join(json.dumps(row) + "\n" for row in [ONE, *bad]), encoding="utf-8")
    result = run_without_training(tmp_path, file, "--tokenizer", small_checkpoint, "--json")
    assert result.returncode == 1, result.stderr
    told = json.loads(result.stdout)
    assert (told["rows"], told["bad_rows"], told["refused"]) == (26, 25, True)
    assert len(told["errors"]) == 25
    assert told["errors"][3] == {
        "file": str(file),
        "line": 5,
        "field": "prompt",
        "problem": "must be a string or a list of messages, found int 5",
    }
    assert told["packs"] == 1
    assert told["warnings"] == []
    result = run_without_training(tmp_path, file, "--tokenizer", small_checkpoint)
    assert result.returncode == 1
    assert result.stdout.count("must be a string") == 20
    assert "and 5 more" in result.stdout
    result = run_without_training(tmp_path, file, "--config", ROOT / "configs" / "polar_7b.py")
    assert result.stderr.startswith("check_data.py: --config needs what training needs")


def test_an_output_that_is_closed_or_full_ends_without_a_traceback(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    """And with everything written."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ONE))
    command = (file, "--tokenizer", small_checkpoint, "--report", tmp_path / "page")
    reads, writes = os.pipe()
    os.close(reads)
    closed = run_without_training(tmp_path, *command, stdout=writes)
    os.close(writes)
    assert (closed.returncode, closed.stderr) == (0, "")
    assert (tmp_path / "page" / "index.html").is_file()
    with open("/dev/full", "w") as full:
        result = run_without_training(tmp_path, *command, stdout=full.fileno())
    assert result.returncode == 1
    assert result.stderr == "check_data.py: [Errno 28] No space left on device\n"


def test_an_interrupted_check_says_nothing_more(
    monkeypatch: pytest.MonkeyPatch, tool: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["check_data.py", "rows.jsonl"])
    with pytest.raises(SystemExit) as raised:
        tool.main()
    assert raised.value.code == 130
    assert capsys.readouterr().err == ""


def test_what_an_output_cannot_show_is_spelled_out(
    monkeypatch: pytest.MonkeyPatch, tool: Any
) -> None:
    data = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(data, "ascii"))
        tool.say("à\udcff.jsonl")
        assert data.getvalue() == b"\\xe0\\udcff.jsonl\n"
        patch.setattr(sys, "stdout", None)
        tool.say("to nobody")


def test_what_a_report_lacks_is_said_before_the_rows_are_read(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Any
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ONE))
    monkeypatch.setattr(tool, "survey", lambda *_, **__: pytest.fail("rows are read"))

    def told(report: Path) -> str:
        command = ["check_data.py", file, "--tokenizer", small_checkpoint, "--report", report]
        monkeypatch.setattr(sys, "argv", [str(c) for c in command])
        with pytest.raises(SystemExit) as raised:
            tool.main()
        return str(raised.value)

    assert told(file) == f"check_data.py: --report {file}: cannot be written to: File exists"
    below = file / "page"
    assert told(below) == f"check_data.py: --report {below}: cannot be written to: Not a directory"
    for name in ("plots", "data"):
        monkeypatch.delitem(sys.modules, f"polar_xtuner.report.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    expected = "check_data.py: --report needs matplotlib: pip install 'polar_xtuner[eval]'"
    assert told(tmp_path / "page") == expected


@pytest.mark.parametrize("config", ["x", "{}", '{"tokenizer_class": "BertTokenizer"}'])
def test_a_tokenizer_that_transformers_cannot_make_is_named(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Any
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ONE))
    command = ["check_data.py", f"{tmp_path}/rows.jsonl", "--tokenizer", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as raised:
        tool.main()
    assert str(raised.value).startswith(f"check_data.py: --tokenizer {tmp_path}: ")
    assert "\n" not in str(raised.value)


def test_a_base_without_polars_tokens_is_told_of_settings_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Any
) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    monkeypatch.setattr(
        tool, "open_tokenizer", lambda _: Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    )
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ONE))
    monkeypatch.setattr(sys, "argv", ["check_data.py", str(file), "--tokenizer", "base"])
    with pytest.raises(SystemExit) as raised:
        tool.main()
    assert str(raised.value).startswith(
        "check_data.py: --tokenizer base: the tokenizer has no token"
    )
    assert "a --config" in str(raised.value)


def test_a_config_gives_the_limits_and_a_gpu_the_time(
    small_checkpoint: Path,
    tmp_path: Path,
    tool: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in some_rows(40)), encoding="utf-8")

    def told(*options: object) -> Any:
        config = ("--config", ROOT / "configs" / "polar_7b.py", "--tokenizer", small_checkpoint)
        command = ["check_data.py", *map(str, (*config, *options))]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            tool.main()
        assert ended.value.code == 0
        return json.loads(capsys.readouterr().out)

    settings = (f"data_files={file}", "max_length=2000", "max_response_length=500")
    gpu = ("--gpu", "NVIDIA A100-SXM4-80GB")
    result = told("--json", "--ranks", 2, *gpu, "--zero", 2, "--cfg-options", *settings)
    assert result["limits"]["max_packed_length"] == 4000  # follows from max_length
    assert (result["limits"]["ranks"], result["limits"]["accumulative_counts"]) == (2, 2)
    assert result["packs"] == 4 * result["steps"]
    estimate = result["estimate"]
    assert estimate["parameters"] == 7358652416
    assert estimate["seconds"] == pytest.approx(estimate["flops"] / (2 * 312e12 * 0.4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl", "--tokenizer", "."], "nowhere.jsonl"),
        (["--tokenizer", "."], "give a FILE"),
        (["rows.jsonl"], "give --tokenizer"),
        (["rows.jsonl", "--tokenizer", ".", "--gpu", "H100"], "--gpu needs a --config"),
        (["rows.jsonl", "--tokenizer", ".", "--ranks", "0"], "--ranks 0"),
        (["rows.jsonl", "--tokenizer", ".", "--mfu", "40"], "--mfu 40"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tool: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(ONE))
    monkeypatch.setattr(sys, "argv", ["check_data.py", *arguments])
    with pytest.raises(SystemExit) as raised:
        tool.main()
    assert str(raised.value).startswith("check_data.py: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("model = dict(", "cannot be read: SyntaxError"),
        ("lr = 1 / 0", "cannot be read: ZeroDivisionError"),
        ("model = dict(llm=dict())", "has no train_dataloader.dataset"),
        (
            "train_dataloader = dict(dataset=dict(), sampler=dict())\nmodel = dict(llm=dict())",
            "has no model.llm.pretrained_model_name_or_path",
        ),
        (
            "train_dataloader = dict(dataset=dict(), sampler=dict())\n"
            "model = dict(llm=dict(pretrained_model_name_or_path='internlm/POLAR-7B'))",
            "has no train_dataloader.dataset.tokenizer",
        ),
    ],
)
def test_configs_of_something_else_are_refused(
    config: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Any
) -> None:
    file = tmp_path / "config.py"
    file.write_text(config)
    monkeypatch.setattr(sys, "argv", ["check_data.py", "rows.jsonl", "--config", str(file)])
    with pytest.raises(SystemExit) as raised:
        tool.main()
    assert str(raised.value).startswith(f"check_data.py: {file} ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_files": {"x": "rows.jsonl", "y": ["rows.jsonl"]}}, "rows.jsonl is in two sets"),
        ({"data_files": {"x": "rows.jsonl", "y": "a/../rows.jsonl"}}, "rows.jsonl is in two sets"),
        ({"data_files": "none.jsonl"}, "data_files: no such file or folder: none.jsonl"),
        ({"data_files": {}}, "data_files is an empty dict"),
        ({"dataset": {"type": "x"}}, "either data_files= or dataset=, and not both"),
        ({"on_bad_row": "drop"}, "on_bad_row='drop'"),
        ({"on_long_group": "drop"}, "on_long_group must be 'error' or 'skip', got 'drop'"),
        ({"num_proc": 0}, "num_proc must be None or a whole number"),
        ({"max_packed_length": "900"}, "max_packed_length must be a whole number >= 1, got '900'"),
        ({"max_length": 900.5}, "max_length must be a whole number >= 1, got 900.5"),
        ({"max_lenght": 900}, "max_lenght"),
    ],
)
def test_what_training_says_of_its_options_is_said_of_the_config(
    options: Raw,
    message: str,
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tool: Any,
) -> None:
    from polar_xtuner.dataset import PolarDataset

    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("rows.jsonl").write_text(json.dumps(ONE))
    options = {"data_files": "rows.jsonl", **options}
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=re.escape(message)):
        PolarDataset(load_tokenizer(small_checkpoint), cache_dir="cache", **options)
    options = {"_delete_": True, "type": "PolarDataset", "tokenizer": {}, **options}
    Path("config.py").write_text(
        f"_base_ = {str(ROOT / 'configs' / 'polar_7b.py')!r}\n"
        f"train_dataloader = dict(dataset={options!r})\n"
    )
    command = ["check_data.py", "--config", "config.py", "--tokenizer", str(small_checkpoint)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as raised:
        tool.main()
    assert str(raised.value).startswith("check_data.py: ")
    assert message in str(raised.value)


@pytest.fixture(scope="module")
def tool() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("check_data", ROOT / "tools" / "check_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
