"""Odd rows: each kind where it is, and none where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from hypothesis import given
from hypothesis import strategies as st

from polar_xtuner.data_checks import KINDS, Giveaways, PairLedger, RowChecks, keep_raw
from polar_xtuner.records import Row, map_rows, read_rows

SPECIAL = ["<s>", "</s>", "<|reward|>", "[UNUSED_TOKEN_130]"]
SOUND = {
    "prompt": "What is the capital of China, please?",
    "reference": "Beijing.",
    "chosen": "It is Beijing.",
    "rejected": "It is Shanghai.",
}


def row_of(**fields: Any) -> Row:
    [row] = map_rows([{**SOUND, **fields}], "file", keep_raw())
    assert isinstance(row, Row), row
    return row


def found(**fields: Any) -> list[tuple[str, str]]:
    return [(kind, field) for kind, field, _ in RowChecks(SPECIAL)(row_of(**fields))]


def messages(*roles_and_texts: str) -> list[dict[str, str]]:
    pairs = zip(roles_and_texts[::2], roles_and_texts[1::2])
    return [{"role": role, "content": text} for role, text in pairs]


@pytest.mark.parametrize(
    ("kind", "field", "fields"),
    [
        ("rejected_is_reference", "rejected", {"rejected": "Beijing."}),
        ("chosen_is_reference", "chosen[1]", {"chosen": ["It is Beijing.", "Beijing."]}),
        ("repeated_candidate", "rejected[2]", {"rejected": ["a", "b", "a"]}),
        ("near_equal", "rejected", {"rejected": "It  is Beijing.\n"}),
        ("near_equal", "rejected", {"chosen": "caf\u00e9", "rejected": "cafe\u0301"}),
        ("negative_margin", "margin", {"margin": -0.5}),
        ("empty", "reference", {"reference": ""}),
        ("empty", "prompt", {"prompt": " \n"}),
        ("placeholder", "chosen", {"chosen": " None\n"}),
        ("placeholder", "rejected", {"rejected": "[object Object]"}),
        ("special_token", "chosen", {"chosen": "Beijing.</s>"}),
        ("special_token", "prompt", {"prompt": "Capital of China?<|reward|>"}),
        ("chat_mark", "prompt", {"prompt": "<|im_start|>user\nCapital of China?"}),
        ("chat_mark", "rejected", {"rejected": "Shanghai.\n\nHuman: And of France?"}),
        ("chat_mark", "chosen", {"chosen": "### Response: Beijing, it is."}),
        ("think_tag", "reference", {"reference": "<think>China?</think>Beijing."}),
        ("prompt_in_answer", "chosen", {"chosen": f"{SOUND['prompt']} Beijing."}),
        ("role", "reference", {"reference": messages("user", "Beijing.")}),
        ("role", "prompt", {"prompt": messages("user", "Capital?", "assistant", "Beijing.")}),
        ("role", "chosen[0]", {"chosen": [messages("assistant", "Beijing", "user", "Thanks")]}),
        ("replacement_character", "chosen", {"chosen": "Beijing\ufffd"}),
        ("control_character", "rejected", {"rejected": "\x1b[1mShanghai\x1b[0m"}),
        ("escaped_newlines", "chosen", {"chosen": "Beijing.\\n\\nReally."}),
        ("html_entity", "prompt", {"prompt": "China&#39;s capital?"}),
        ("misspelled_field", "Wrapper", {"Wrapper": "pretrain"}),
        ("misspelled_field", "margins", {"margins": 1}),
    ],
)
def test_each_kind_is_found_where_it_is(kind: str, field: str, fields: dict[str, Any]) -> None:
    assert found(**fields) == [(kind, field)]
    assert kind in KINDS


def test_double_encoding_is_found_in_text_that_it_has_spoilt() -> None:
    texts = ["naïve café", "Ða", "中文。", "Ωμέγα", "«Voilà…»", "5 °C", "Привет", "“Yes”", "👍"]
    for text in texts:
        assert ("mojibake", "chosen") in found(chosen=(text * 2).encode().decode("latin-1"))
    for text in ["naïve café", "5 °C", "“Yes’", "中文"]:  # Windows-1252 lacks five bytes
        assert ("mojibake", "chosen") in found(chosen=(text * 2).encode().decode("cp1252"))


@given(st.text(st.characters(whitelist_categories=["Ll", "Lu", "Lo", "Zs", "Po", "Pi", "Pf"])))
def test_text_is_not_taken_for_double_encoding_unless_it_reads_as_utf8(text: str) -> None:
    """What is found can be decoded; text in one script of letters cannot."""
    for kind, _, problem in RowChecks(SPECIAL)(row_of(chosen=f"It is {text}")):
        if kind == "mojibake":
            shown = problem.split("'")[1]
            assert any(ord(c) > 127 for c in shown)
            assert "which should be" in problem


@pytest.mark.parametrize(
    "text",
    [
        "Il dit : « Voilà… »",
        "«CAFÉ»",
        "AMANHû disse",
        "2 °C ± 1 µm, ½ ÷ ¾",
        "Él está aquí—¿sí?",
        "Straße “Größe”",
        "x < y && y > z",
        "a <b|c> d",
        "None of these.",
        "print('a\\n')",
        "Human: a being",
        r"Let $\nu>0$ and $\nabla f\neq 0$.",
        r"$a \neq b$, so $b \neq a$ and $\neg p \wedge \neg q$",
        r"They are in C:\new\names and in D:\nets\net.txt.",
        r'printf "a\nb\n"',
        r"Use $'\n' and \n in sed: s/\n/ /g",
        r"Split at '\n\n', that is `\n` and `\n`.",
        "La lettre «\u00a0Â\u00a0» a un accent, «\u00a0Ã\u00a0» un tilde.",
        "“Â”, “Ă”, «Â»",
        "<p>a &lt; b</p>",
        "```html\n<p>a &lt; b &amp;&amp; c</p>\n```",
        "Write `&lt;` for it.",
        "f <|x|> g",
    ],
)
def test_ordinary_text_is_let_alone(text: str) -> None:
    assert found(chosen=text) == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("escaped_newlines", r"First.\nno\nnext\nnumbers"),
        ("escaped_newlines", r"Q:\nwhat?\nA:\nthis"),
        ("escaped_newlines", r"a\nb\nc"),
        ("escaped_newlines", r"It's $\nu$.\n\nDon't."),
        ("escaped_newlines", r'"Well," she said.\n\nThen "Yes."'),
        ("mojibake", "“Â” and Ã©tÃ©"),
        ("mojibake", "déjà: Ã\u00a0 la carte"),
        ("html_entity", "`a` &amp; b"),
        ("html_entity", "<p>a</p> &amp; b"),
        ("html_entity", "a &lt;p&gt; b"),
    ],
)
def test_faults_are_found_beside_what_is_let_alone(kind: str, text: str) -> None:
    assert found(chosen=text) == [(kind, "chosen")]


@pytest.mark.parametrize(
    "prompt",
    [
        'def add(a, b):\n    """Add two numbers."""',
        "from typing import List\n\n\ndef first(of: List[int]) -> int:",
        "int add(int a, int b) {",
    ],
)
def test_an_answer_may_complete_the_code_of_its_prompt(prompt: str) -> None:
    assert found(prompt=prompt, chosen=f"{prompt}\n    return 1") == []


def test_sound_rows_are_let_alone() -> None:
    assert found() == []
    assert found(margin=0.5, wrapper="pretrain", source="a", id=3, label="x", models="y") == []
    assert found(marginal=1, wrapped=True) == []
    talk = messages("assistant", "Beijing.", "user", "Sure?", "assistant", "Yes.")
    assert found(reference=talk, prompt=messages("system", "Be brief.", "user", "Capital?")) == []


def test_fields_that_a_map_function_gives_are_looked_at() -> None:
    def better(raw: dict[str, Any]) -> dict[str, Any]:
        return {**SOUND, "chosen": raw["best"], "margins": 1}

    [row] = map_rows([{"best": ["Beijing.</s>", "Beijing!"]}], "file", keep_raw(better))
    assert isinstance(row, Row)
    assert [odd[:2] for odd in RowChecks(SPECIAL)(row)] == [
        ("special_token", "chosen[0]"),
        ("misspelled_field", "margins"),
    ]


def ledger_of(*rows: dict[str, Any]) -> list[tuple[int, str, str]]:
    ledger = PairLedger()
    for number, fields in enumerate(rows):
        ledger.add(number, row_of(**fields))
    return [(n, odd[0], odd[2]) for n, odd in ledger.findings(lambda n: f"file:{n + 1}")]


def test_rows_that_contradict_each_other_are_both_named() -> None:
    swapped = {"chosen": SOUND["rejected"], "rejected": SOUND["chosen"]}
    [(row, kind, problem)] = ledger_of({}, {"prompt": "Other?"}, swapped)
    assert (row, kind) == (2, "contradiction")
    assert "file:1" in problem


def test_a_pair_is_the_same_among_several_candidates() -> None:
    both = {"chosen": ["x", SOUND["chosen"]], "rejected": [SOUND["rejected"], "y"]}
    assert [(row, kind) for row, kind, _ in ledger_of({}, both)] == [(1, "duplicate")]
    [(row, kind, problem)] = ledger_of(both, {**both, "margin": 1})
    assert (row, kind) == (1, "duplicate")
    assert "4 of these pairs" in problem


def test_another_reference_may_turn_a_label_and_another_wrapper_may_not() -> None:
    swapped = {"chosen": SOUND["rejected"], "rejected": SOUND["chosen"]}
    assert ledger_of({}, {**swapped, "reference": "Shanghai."}) == []
    assert [kind for _, kind, _ in ledger_of({}, {"wrapper": "pretrain"})] == ["other_wrapper"]
    kinds = [kind for _, kind, _ in ledger_of({}, {**swapped, "wrapper": "pretrain"})]
    assert kinds == ["contradiction"]


@given(st.lists(st.tuples(*[st.sampled_from("ab")] * 2, *[st.sampled_from("xyz")] * 2)))
def test_pairs_that_come_again_are_those_a_plain_search_finds(
    drawn: list[tuple[str, str, str, str]],
) -> None:
    rows = [row for row in drawn if row[2] != row[3]]
    expected = set()
    for number, (prompt, reference, chosen, rejected) in enumerate(rows):
        if (prompt, reference, chosen, rejected) in rows[:number]:
            expected.add((number, "duplicate"))
        if (prompt, reference, rejected, chosen) in rows[:number]:
            expected.add((number, "contradiction"))
    names = ("prompt", "reference", "chosen", "rejected")
    odd = ledger_of(*(dict(zip(names, row)) for row in rows))
    assert {(number, kind) for number, kind, _ in odd} == expected
    assert len(odd) == len(expected)


def giveaways_of(rows: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    counted = Giveaways()
    for fields in rows:
        counted.add(row_of(**fields))
    return [(one.feature, one.chosen_only, one.rejected_only) for one in counted.found()]


def test_what_tells_the_sides_of_a_data_set_apart_is_found() -> None:
    trailing = {"chosen": ["It is Beijing.\n", "Beijing it is.\n"]}
    assert giveaways_of([trailing] * 15) == [("ends with white space", 30, 0)]
    assert giveaways_of([trailing] * 9) == []  # 18 pairs are few
    assert giveaways_of([trailing] * 15 + [{}] * 300) == []  # and 30 of 330 too
    marked = {"rejected": "**It is Shanghai.**"}
    assert giveaways_of([marked] * 19 + [{"chosen": "**It is Beijing.**"}]) == [
        ("ends with a punctuation mark", 19, 1),
        ("has Markdown", 1, 19),
    ]
    assert giveaways_of([marked] * 15 + [{"chosen": "**It is Beijing.**"}] * 15) == []


@pytest.mark.parametrize("name", ["gsm8k", "pandalm", "mt_bench", "arena_hard"])
def test_real_data_do_not_give_themselves_away(name: str, shared_data: Path) -> None:
    counted = Giveaways()
    for row in read_rows([shared_data / f"{name}.jsonl"]):
        assert isinstance(row, Row)
        counted.add(row)
    assert counted.found() == ()
    assert counted.pairs > 200


def test_the_guide_explains_every_kind() -> None:
    guide = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert all(f"| `{kind}` | {meaning} |" in guide for kind, meaning in KINDS.items())
