import copy
import itertools
import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA_SETS, with_polar_tokens
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from polar_xtuner.template import (
    REWARD_TOKEN,
    SEPARATOR_TOKEN,
    Candidate,
    PolarTemplate,
    check_vocabulary,
)

Ids = list[int]

SPECIAL = ("<s>", "</s>", SEPARATOR_TOKEN, REWARD_TOKEN)
FRAGMENTS = [
    *SPECIAL,
    *("<", "s", "/s", ">", "<s", "</", "<|", "|>", "reward", "<|reward", "[", "]", "130]"),
    *(
        "[UNUSED_TOKEN_",
        "UNUSED",
        "_TOKEN_",
        "<unk>",
        "<0x00>",
        "<|im_start|>",
        "[UNUSED_TOKEN_141]",
    ),
    *("\u2581", " ", "\n", "\r", "\t", "\0", "\x01", "\x1b", "\x7f", "\u202e", "\ufeff", "\u200b"),
    *("\ud800", "\udfff", "\udc00\ud800", "\ud83d\ude00", "\U0001f600", "\u0344", "\ufdfa"),
]

# Built from the special strings and what could be merged into one, and of any other text.
hostile_texts = st.lists(
    st.sampled_from(FRAGMENTS) | st.text(st.characters(exclude_categories=()), max_size=6),
    max_size=12,
).map("".join)
wrappers = st.sampled_from(["sft", "pretrain"])
hostile_candidates = st.builds(
    Candidate, hostile_texts, hostile_texts, hostile_texts, wrapper=wrappers
)


def text_of(messages: list[dict[str, str]]) -> str:
    return "\n".join(m["content"] for m in messages)


def as_read(text: str) -> str:
    """A text without lone surrogates, as any tokenizer has to read it."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def is_one_scored_sequence(ids: Ids, template: PolarTemplate) -> bool:
    """BOS, reward token and separator stand once, the first two at the ends; EOS nowhere."""
    inner = ids[1:-1]
    return (
        ids[0] == template.bos_token_id
        and ids[-1] == template.reward_token_id
        and inner.count(template.separator_token_id) == 1
        and not {template.bos_token_id, template.eos_token_id, template.reward_token_id} & {*inner}
        and len(ids) <= template.max_length
    )


def halves(ids: Ids, template: PolarTemplate) -> tuple[Ids, Ids]:
    at = ids.index(template.separator_token_id)
    return ids[1:at], ids[at + 1 : -1]


def expected(template: PolarTemplate, prompt: Ids, reference: Ids, output: Ids, sep: Ids) -> Ids:
    """The template's formula once more, plainly, for ids that do not merge across their joints."""
    limit = template.max_response_length
    count = {name: len(ids) + 1 for name, ids in zip("PRO", (prompt, reference, output))}
    budget = (template.max_length - 4 - min(count["R"], limit) - min(count["O"], limit)) // 2
    if count["P"] > budget:
        prompt = prompt[-budget:] if budget > 0 else []
    reference, output = reference[: limit - 1], output[: limit - 1]
    return [
        template.bos_token_id,
        *(prompt + (sep if reference else []) + reference),
        template.separator_token_id,
        *(prompt + (sep if output else []) + output),
        template.reward_token_id,
    ]


# What a tokenizer is here: each of these must give the same guarantees.


@pytest.fixture(scope="session")
def slow_tokenizer(shared_data: Path) -> Any:
    return build_slow_tokenizer(shared_data)


def build_slow_tokenizer(shared_data: Path, **options: Any) -> Any:
    from transformers import LlamaTokenizer

    options = {"legacy": False, "add_prefix_space": False, "add_bos_token": True, **options}
    vocabulary = str(shared_data / "internlm2_tokenizer.model")
    return with_polar_tokens(LlamaTokenizer(vocab_file=vocabulary, **options))


@pytest.fixture(scope="session")
def internlm2_backend(internlm2_tokenizer: Any) -> Tokenizer:
    return internlm2_tokenizer.backend_tokenizer


@pytest.fixture(scope="session")
def demo_backend(demo_tokenizer: Any) -> Tokenizer:
    return demo_tokenizer.backend_tokenizer


@pytest.fixture(scope="session")
def composing_tokenizer() -> Tokenizer:
    """Bytes after NFC, as Qwen has it: a text of few bytes can become many."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(letters))}, []))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL])
    return tokenizer


KINDS = [
    "internlm2_tokenizer",
    "internlm2_backend",
    "slow_tokenizer",
    "demo_tokenizer",
    "demo_backend",
    "composing_tokenizer",
]


@pytest.fixture(scope="session", params=KINDS)
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def any_template(any_tokenizer: Any) -> PolarTemplate:
    return PolarTemplate(any_tokenizer)


@pytest.fixture(scope="session")
def tight_template(any_tokenizer: Any) -> PolarTemplate:
    """Limits that most candidates meet."""
    return PolarTemplate(any_tokenizer, max_length=40, max_response_length=12)


@pytest.fixture(scope="session")
def demo_template(demo_tokenizer: Any) -> PolarTemplate:
    return PolarTemplate(demo_tokenizer)


@pytest.fixture(scope="session")
def rows(shared_data: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [json.loads(line) for line in open(shared_data / f"{name}.jsonl", encoding="utf-8")]
        for name in DATA_SETS
    }


@pytest.fixture(scope="session")
def candidates(rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[Candidate]]:
    """Chosen and rejected of every row."""
    return {
        name: [
            Candidate(
                text_of(row["prompt"]),
                text_of(row["reference"]),
                text_of(row[side]),
                row.get("wrapper", "sft"),
            )
            for row in rows[name]
            for side in ("chosen", "rejected")
        ]
        for name in DATA_SETS
    }


# The ids are those that POLAR was trained on.


@pytest.mark.parametrize(
    ("name", "uncut", "cut"),
    [("gsm8k", 1988, 0), ("pandalm", 649, 0), ("mt_bench", 274, 0), ("arena_hard", 389, 1)],
)
def test_ids_are_those_of_xtuner_wherever_nothing_is_cut(
    name: str,
    uncut: int,
    cut: int,
    rows: dict[str, list[dict[str, Any]]],
    candidates: dict[str, list[Candidate]],
    internlm2_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upstream = pytest.importorskip("xtuner.dataset.preference_dataset")
    # Looks at each id for a tensor before it decodes a list of them: two thirds of the time.
    monkeypatch.setattr("transformers.tokenization_utils_base.to_py_obj", lambda ids: ids)
    template = PolarTemplate(internlm2_tokenizer)
    lengths = {}
    texts = list(dict.fromkeys(text for c in candidates[name] for text in c[:3]))
    for text, ids in zip(texts, internlm2_tokenizer(texts, add_special_tokens=False).input_ids):
        lengths[text] = len(ids) + 1

    def fits(c: Candidate) -> bool:
        prompt, reference, output = (lengths[text] for text in c[:3])
        return max(reference, output) <= 4096 and prompt <= (16380 - reference - output) // 2

    ours = template.encode(candidates[name])
    compared = 0
    for i, row in enumerate(rows[name]):
        pair = slice(2 * i, 2 * i + 2)
        if not all(fits(c) for c in candidates[name][pair]):
            continue
        theirs = upstream.tokenize_ref(
            row,
            internlm2_tokenizer,
            max_length=16384,
            max_response_length=4096,
            is_reward=True,
            reward_token_id=template.reward_token_id,
        )
        assert ours[pair] == [theirs["chosen_ids"], theirs["rejected_ids"]], f"{name}:{i + 1}"
        compared += 1
    assert (compared, len(rows[name]) - compared) == (uncut, cut)


def test_the_row_that_is_cut_keeps_the_head_of_its_answer_and_all_else(
    candidates: dict[str, list[Candidate]], internlm2_tokenizer: Any
) -> None:
    template = PolarTemplate(internlm2_tokenizer)

    def encode(text: str) -> Ids:
        return internlm2_tokenizer.encode(text, add_special_tokens=False)

    (long,) = (c for c in candidates["arena_hard"] if len(encode(c.output)) >= 4096)
    (ids,) = template.encode([long])
    reference_half, output_half = halves(ids, template)
    prompt = encode(long.prompt)
    assert reference_half == encode(f"{long.prompt}\n{long.reference}")
    assert output_half == prompt + encode("\n") + encode(long.output)[:4095]


def test_the_slow_tokenizer_gives_the_ids_of_the_fast_one_on_real_rows(
    candidates: dict[str, list[Candidate]], internlm2_tokenizer: Any, slow_tokenizer: Any
) -> None:
    some = [c for name in DATA_SETS for c in candidates[name][::10]]
    assert len(some) > 600
    assert PolarTemplate(slow_tokenizer).encode(some) == PolarTemplate(internlm2_tokenizer).encode(
        some
    )


@pytest.mark.parametrize("wrapper", ["sft", "pretrain"])
@pytest.mark.parametrize("reference", ["31", ""])
@pytest.mark.parametrize("output", ["42", ""])
def test_a_newline_stands_before_an_answer_that_is_not_empty_and_only_in_wrapper_sft(
    wrapper: str, reference: str, output: str, demo_tokenizer: Any, demo_template: PolarTemplate
) -> None:
    def encode(text: str) -> Ids:
        return demo_tokenizer.encode(text, add_special_tokens=False)

    def joined(answer: str) -> str:
        return "12" + ("\n" if wrapper == "sft" and answer else "") + answer

    (ids,) = demo_template.encode([Candidate("12", reference, output, wrapper)])
    assert ids == [
        demo_tokenizer.bos_token_id,
        *encode(joined(reference)),
        demo_tokenizer.convert_tokens_to_ids(SEPARATOR_TOKEN),
        *encode(joined(output)),
        demo_tokenizer.convert_tokens_to_ids(REWARD_TOKEN),
    ]


def test_sft_is_the_default_wrapper(demo_template: PolarTemplate) -> None:
    default, sft = demo_template.encode(
        [Candidate("1", "2", "3"), Candidate("1", "2", "3", wrapper="sft")]
    )
    assert default == sft


def test_prompt_and_answer_are_encoded_as_one_text(demo_template: PolarTemplate) -> None:
    """ " apples" is one token of the demo: cut between "app" and "les" it stays one."""
    whole, split = demo_template.encode(
        [Candidate(" apples", "", ""), Candidate(" app", "les", "les", "pretrain")]
    )
    assert split == whole


# Truncation.

digits = st.integers(0, 30).map(lambda n: "0123456789"[: n % 10] + "7" * (n - n % 10))


@given(
    prompt=st.integers(0, 60),
    reference=st.integers(0, 16),
    output=st.integers(0, 16),
    max_response_length=st.integers(2, 12),
    spare=st.integers(0, 60),
    wrapper=wrappers,
)
@example(prompt=5, reference=9, output=9, max_response_length=6, spare=0, wrapper="sft")  # no room
@example(prompt=5, reference=3, output=3, max_response_length=6, spare=9, wrapper="sft")  # 6 = |P|
@example(prompt=5, reference=3, output=3, max_response_length=6, spare=7, wrapper="sft")  # 5
@example(prompt=5, reference=3, output=3, max_response_length=6, spare=5, wrapper="sft")  # 4
def test_cuts_leave_the_counts_of_the_formula_heads_of_answers_and_tails_of_prompts(
    demo_tokenizer: Any,
    prompt: int,
    reference: int,
    output: int,
    max_response_length: int,
    spare: int,
    wrapper: str,
) -> None:
    max_length = 2 * max_response_length + 3 + spare
    template = PolarTemplate(demo_tokenizer, max_length, max_response_length)
    texts = [numerals[:n] for numerals, n in zip(NUMERALS, (prompt, reference, output))]
    # One id a character, and none that spans two: digits are tokens of their own.
    parts = [demo_tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert [len(part) for part in parts] == [prompt, reference, output]
    newline = demo_tokenizer.encode("\n", add_special_tokens=False) if wrapper == "sft" else []
    (ids,) = template.encode([Candidate(*texts, wrapper)])
    assert ids == expected(template, *parts, newline)
    assert is_one_scored_sequence(ids, template)


NUMERALS = [
    "3141592653589793238462643383279502884197169399375105820974944592",
    "2" * 8 + "71828182",
]
NUMERALS.append("1618033988749894848")


@settings(max_examples=60)
@given(
    texts=st.tuples(*[st.text("ab \n<s>é東", max_size=60) for _ in range(3)]),
    max_response_length=st.integers(2, 20),
    spare=st.integers(0, 60),
    wrapper=wrappers,
)
def test_a_cut_half_is_the_tail_of_the_prompt_and_the_head_of_the_answer(
    demo_tokenizer: Any,
    texts: tuple[str, str, str],
    max_response_length: int,
    spare: int,
    wrapper: str,
) -> None:
    """Also where tokens span the joints: a half is whole, or made of ids of its parts."""
    max_length = 2 * max_response_length + 3 + spare
    template = PolarTemplate(demo_tokenizer, max_length, max_response_length)
    wide = PolarTemplate(demo_tokenizer)

    def encode(text: str) -> Ids:
        return halves(wide.encode([Candidate(text, "", "")])[0], wide)[0]

    prompt, *answers = (encode(text) for text in texts)
    (ids,) = template.encode([Candidate(*texts, wrapper)])
    for half, text, answer in zip(halves(ids, template), texts[1:], answers):
        separator = "\n" if wrapper == "sft" and text else ""
        pieces = [
            (prompt[len(prompt) - p :] + encode(separator) + answer[:a])
            for p, a in itertools.product(range(len(prompt) + 1), range(len(answer) + 1))
        ]
        assert half in [encode(texts[0] + separator + text), *pieces]
    assert is_one_scored_sequence(ids, template)


@settings(max_examples=40)
@given(batch=st.lists(hostile_candidates, min_size=2, max_size=5))
def test_a_candidate_gets_the_same_ids_whatever_it_is_compared_with(
    tight_template: PolarTemplate, batch: list[Candidate]
) -> None:
    assert tight_template.encode(batch) == [tight_template.encode([c])[0] for c in batch]


@settings(max_examples=20)
@given(prompt=st.text(max_size=80), reference=st.text(max_size=40), outputs=st.data())
def test_the_output_decides_nothing_about_the_reference_of_another_candidate(
    demo_tokenizer: Any, prompt: str, reference: str, outputs: st.DataObject
) -> None:
    """Outputs of equal length in ids leave equal halves P sep R, however they differ."""
    template = PolarTemplate(demo_tokenizer, 60, 20)
    length = outputs.draw(st.integers(1, 30))
    first, second = (
        outputs.draw(st.text("0123456789", min_size=length, max_size=length)) for _ in range(2)
    )
    a, b = template.encode([Candidate(prompt, reference, text) for text in (first, second)])
    assert halves(a, template)[0] == halves(b, template)[0]


@settings(max_examples=60)
@given(hostile_candidates)
@example(Candidate("\U0001d160" * 9, "1", "2"))  # one character in, three out, under NFC
@example(Candidate("1", "\U0001d160" * 2, "\u0344" * 2))
def test_no_sequence_is_longer_than_max_length(
    tight_template: PolarTemplate, candidate: Candidate
) -> None:
    (ids,) = tight_template.encode([candidate])
    assert len(ids) <= tight_template.max_length
    for half, answer in zip(halves(ids, tight_template), candidate[1:3]):
        if not answer:  # then the half is the prompt, of which the answers left this much
            assert len(half) <= (tight_template.max_length - 4) // 2


def test_answers_that_a_normaliser_lengthens_are_cut_as_well(
    composing_tokenizer: Tokenizer,
) -> None:
    """A note of 4 bytes is 12 after NFC: what counts is how many ids an answer has."""
    template = PolarTemplate(composing_tokenizer, 1000, 100)
    note = "\U0001d160"
    assert len(unicodedata.normalize("NFC", note).encode()) == 12
    (ids,) = template.encode([Candidate("1", "2", note * 20)])
    assert len(halves(ids, template)[1]) == 1 + 1 + 99


def test_parts_that_take_more_ids_joined_than_alone_still_fit() -> None:
    """Where nothing else is cut than the output, P sep R is one text, unless that is too long.

    "cdefghijklmnopqr" alone is one token; after a "b" its letters pair up the other way.
    """
    letters = "bcdefghijklmnopqr"
    pairs = [a + b for a, b in itertools.pairwise(letters)]
    tokens = [*letters, *"0123456789", *pairs]
    merges = [(pair[0], pair[1]) for pair in pairs]
    level = pairs[1::2]  # cd, ef, ...
    while len(level) > 1:
        merges += zip(level[::2], level[1::2])
        level = [a + b for a, b in zip(level[::2], level[1::2])]
        tokens += level
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.add_special_tokens([*SPECIAL])

    def encode(text: str) -> Ids:
        return tokenizer.encode(text).ids

    reference = letters[1:]
    assert len(encode(reference)) == 1 and len(encode("b" + reference)) == 9
    candidate = Candidate("b", reference, "7" * 30, "pretrain")
    for max_length, half in (
        (15, encode("b") + encode(reference)),
        (16, encode("b" + reference)),
    ):
        template = PolarTemplate(tokenizer, max_length, 4)
        (ids,) = template.encode([candidate])
        assert is_one_scored_sequence(ids, template)
        assert halves(ids, template) == (half, encode("b") + encode("7" * 3))


# Content is data.


@given(hostile_candidates)
@example(Candidate(*["<s></s><|reward|>[UNUSED_TOKEN_130]"] * 3))
@example(Candidate(*["<s", "><s", ">"]))
@example(Candidate("<|rew", "ard|>", "ard|>", "pretrain"))
@example(Candidate("[UNUSED_TOKEN", "_130]", "_130]", "pretrain"))
@example(Candidate("\0", "\ud800", "\udfff\0"))
def test_no_content_yields_a_special_token(
    any_template: PolarTemplate, candidate: Candidate
) -> None:
    (ids,) = any_template.encode([candidate])
    assert is_one_scored_sequence(ids, any_template)


@settings(max_examples=60)
@given(hostile_candidates)
@example(Candidate("<s>" * 30, "</s>" * 30, "[UNUSED_TOKEN_130]" * 30))
def test_no_content_yields_a_special_token_when_it_is_cut(
    tight_template: PolarTemplate, candidate: Candidate
) -> None:
    (ids,) = tight_template.encode([candidate])
    assert is_one_scored_sequence(ids, tight_template)


@pytest.mark.parametrize(
    ("piece", "size"), [("a", 1_000_000), ("\ud800", 30_000), *((t, 100_000) for t in SPECIAL)]
)
def test_a_megabyte_of_one_letter_is_encoded_like_any_text(
    any_template: PolarTemplate, piece: str, size: int
) -> None:
    """And so are texts of special strings only, and of what is no Unicode."""
    text = piece * (size // len(piece))
    (ids,) = any_template.encode([Candidate("1", "2", text)])
    assert is_one_scored_sequence(ids, any_template)
    (short,) = any_template.encode([Candidate("1", "2", text[:10_000])])
    assert ids[:1000] == short[:1000]


@pytest.mark.parametrize("kind", ["demo_tokenizer", "internlm2_tokenizer", "slow_tokenizer"])
def test_other_special_tokens_are_text_in_the_content_too(
    request: pytest.FixtureRequest, kind: str
) -> None:
    word = "<|im_start|>"
    tokenizer = copy.deepcopy(request.getfixturevalue(kind))
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [word]}, replace_additional_special_tokens=False
    )
    (added,) = tokenizer.encode(word, add_special_tokens=False)
    (ids,) = PolarTemplate(tokenizer).encode([Candidate(word, f" {word}", word)])
    assert added not in ids


@pytest.fixture(scope="session", params=["demo_tokenizer", "internlm2_tokenizer"])
def inner_and_outer(request: pytest.FixtureRequest) -> tuple[Any, PolarTemplate, PolarTemplate]:
    """A transformers tokenizer, the template of its `tokenizers.Tokenizer` and its own."""
    tokenizer = request.getfixturevalue(request.param)
    return tokenizer, PolarTemplate(tokenizer.backend_tokenizer), PolarTemplate(tokenizer)


@given(hostile_candidates)
def test_nothing_of_the_content_is_lost(
    inner_and_outer: tuple[Any, PolarTemplate, PolarTemplate], candidate: Candidate
) -> None:
    """What was taken apart reads as it did: both halves decode to the texts they came from."""
    tokenizer, _, template = inner_and_outer
    (ids,) = template.encode([candidate])
    for half, answer in zip(halves(ids, template), candidate[1:3]):
        separator = "\n" if candidate.wrapper == "sft" and answer else ""
        text = as_read(candidate.prompt) + separator + as_read(answer)
        if tokenizer.backend_tokenizer.token_to_id("\u2581") is not None:
            text = text.replace("\u2581", " ")  # sentencepiece writes a space like this
        assert tokenizer.decode(half, clean_up_tokenization_spaces=False) == text


@given(st.lists(hostile_candidates, max_size=4))
def test_a_tokenizers_tokenizer_gives_the_ids_of_the_transformers_one_around_it(
    inner_and_outer: tuple[Any, PolarTemplate, PolarTemplate], batch: list[Candidate]
) -> None:
    _, inner, outer = inner_and_outer
    assert inner.special_ids == outer.special_ids
    assert inner.encode(batch) == outer.encode(batch)


def test_truncation_and_padding_of_the_given_tokenizer_neither_act_nor_change(
    demo_tokenizer: Any,
) -> None:
    batch = [Candidate("1" * 50, "2 <s>", "3"), Candidate("1", "2", "3")]
    plain = PolarTemplate(demo_tokenizer.backend_tokenizer).encode(batch)
    restless = Tokenizer.from_str(demo_tokenizer.backend_tokenizer.to_str())
    restless.enable_truncation(3)
    restless.enable_padding(length=64)
    before = restless.to_str()
    assert PolarTemplate(restless).encode(batch) == plain
    assert restless.to_str() == before
    assert not restless.encode_special_tokens


# Settings.


def test_configured_ids_override_those_of_the_tokenizer(demo_tokenizer: Any) -> None:
    template = PolarTemplate(demo_tokenizer, separator_token_id=1000, reward_token_id=1001)
    (ids,) = template.encode([Candidate("12", "3", "4")])
    assert (ids.count(1000), ids[-1]) == (1, 1001)
    own = PolarTemplate(demo_tokenizer)
    (usual,) = own.encode([Candidate("12", "3", "4")])
    renamed = {own.separator_token_id: 1000, own.reward_token_id: 1001}
    assert ids == [renamed.get(i, i) for i in usual]


def test_no_content_yields_the_token_of_a_configured_id(internlm2_tokenizer: Any) -> None:
    word = "[UNUSED_TOKEN_141]"  # a piece of the vocabulary, which merges build from its text
    piece = internlm2_tokenizer.convert_tokens_to_ids(word)
    template = PolarTemplate(internlm2_tokenizer, separator_token_id=piece)
    (ids,) = template.encode([Candidate(word, f"<s>{word}", word)])
    assert is_one_scored_sequence(ids, template)


def test_an_id_that_is_a_single_character_is_refused_once_the_content_has_it(
    demo_tokenizer: Any,
) -> None:
    letter = demo_tokenizer.convert_tokens_to_ids("x")
    template = PolarTemplate(demo_tokenizer, reward_token_id=letter)
    with pytest.raises(ValueError, match=f"{letter}.*reward_token_id"):
        template.encode([Candidate("x", "1", "2")])


def without(tokenizer: Any, token: str) -> Tokenizer:
    """The backend of a tokenizer with a token renamed."""
    whole = tokenizer.backend_tokenizer.to_str()
    assert f'"{token}"' in whole
    return Tokenizer.from_str(whole.replace(f'"{token}"', '"<renamed>"'))


@pytest.mark.parametrize(
    ("token", "option"),
    [(SEPARATOR_TOKEN, "separator_token_id"), (REWARD_TOKEN, "reward_token_id")],
)
def test_a_missing_separator_or_reward_token_is_named_with_the_option_that_sets_it(
    demo_tokenizer: Any, token: str, option: str
) -> None:
    tokenizer = without(demo_tokenizer, token)
    with pytest.raises(ValueError) as error:
        PolarTemplate(tokenizer)
    assert token in str(error.value) and option in str(error.value)
    template = PolarTemplate(tokenizer, **{option: 1000})
    assert 1000 in template.encode([Candidate("1", "2", "3")])[0]


@pytest.mark.parametrize(("token", "what"), [("<s>", "bos"), ("</s>", "eos")])
def test_a_missing_bos_or_eos_is_named(demo_tokenizer: Any, token: str, what: str) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = without(demo_tokenizer, token)
    others = {"bos_token": "<s>", "eos_token": "</s>"}
    del others[f"{what}_token"]
    for tokenizer in (backend, PreTrainedTokenizerFast(tokenizer_object=backend, **others)):
        with pytest.raises(ValueError, match=f"no {what}_token_id.*{token}"):
            PolarTemplate(tokenizer)


def test_equal_special_ids_are_refused(demo_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="four different ids"):
        PolarTemplate(demo_tokenizer, separator_token_id=7, reward_token_id=7)
    with pytest.raises(ValueError, match="four different ids"):
        PolarTemplate(demo_tokenizer, reward_token_id=demo_tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("max_length", "max_response_length"), [(10, 4), (1000, 1), (1000, 0), (0, 2), (8194, 4096)]
)
def test_limits_that_contradict_each_other_are_named(
    demo_tokenizer: Any, max_length: int, max_response_length: int
) -> None:
    with pytest.raises(ValueError) as error:
        PolarTemplate(demo_tokenizer, max_length, max_response_length)
    assert f"{max_length=}" in str(error.value)
    assert f"{max_response_length=}" in str(error.value)


@pytest.mark.parametrize(("max_length", "max_response_length"), [(11, 4), (7, 2), (8195, 4096)])
def test_the_tightest_limits_hold_two_answers_and_no_prompt(
    demo_tokenizer: Any, max_length: int, max_response_length: int
) -> None:
    template = PolarTemplate(demo_tokenizer, max_length, max_response_length)
    (ids,) = template.encode([Candidate("1" * 9999, "2" * 9999, "3" * 9999)])
    assert is_one_scored_sequence(ids, template)
    reference, output = halves(ids, template)
    assert len(reference) == len(output) == max_response_length  # a newline and the answer


def test_an_id_without_a_row_in_the_embedding_is_named(internlm2_tokenizer: Any) -> None:
    template = PolarTemplate(internlm2_tokenizer)
    check_vocabulary(template.special_ids, 92545)
    with pytest.raises(ValueError, match=r"<\|reward\|> has id 92544.*92544 ids"):
        check_vocabulary(template.special_ids, 92544)


def test_a_negative_id_is_named() -> None:
    with pytest.raises(ValueError, match="the BOS has id -1"):
        check_vocabulary({"BOS": -1, "EOS": 2}, 100)
    check_vocabulary({"BOS": 0, "EOS": 99}, 100)


# Fingerprints.


def test_each_setting_changes_the_fingerprint(demo_tokenizer: Any, demo: Any) -> None:
    respaced = Tokenizer.from_str(demo_tokenizer.backend_tokenizer.to_str())
    respaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    longer = Tokenizer.from_str(demo_tokenizer.backend_tokenizer.to_str())
    longer.add_tokens(["forty-two"])
    templates = [
        PolarTemplate(demo_tokenizer),
        PolarTemplate(demo_tokenizer, max_length=16383),
        PolarTemplate(demo_tokenizer, max_response_length=4095),
        PolarTemplate(demo_tokenizer, separator_token_id=1000),
        PolarTemplate(demo_tokenizer, reward_token_id=1000),
        PolarTemplate(demo_tokenizer, separator_token_id=1000, reward_token_id=1001),
        PolarTemplate(demo_tokenizer, separator_token_id=1001, reward_token_id=1000),
        PolarTemplate(respaced),
        PolarTemplate(longer),
        PolarTemplate(without(demo_tokenizer, ";")),
    ]
    assert len({t.fingerprint for t in templates}) == len(templates)
    assert PolarTemplate(demo.build_tokenizer()).fingerprint == templates[0].fingerprint


def test_a_setting_of_a_slow_tokenizer_changes_the_fingerprint(
    shared_data: Path, slow_tokenizer: Any
) -> None:
    plain = PolarTemplate(slow_tokenizer)
    spaced = PolarTemplate(build_slow_tokenizer(shared_data, add_prefix_space=True))
    assert spaced.encode([Candidate("1", "2", "3")]) != plain.encode([Candidate("1", "2", "3")])
    assert spaced.fingerprint != plain.fingerprint


def test_the_fingerprint_is_the_same_in_every_process(demo_tokenizer: Any, tmp_path: Path) -> None:
    demo_tokenizer.save_pretrained(tmp_path)
    program = (
        "import sys; from tokenizers import Tokenizer; "
        "from polar_xtuner.template import PolarTemplate; "
        "print(PolarTemplate(Tokenizer.from_file(sys.argv[1])).fingerprint, "
        "'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "tokenizer.json")],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert found == 2 * [[PolarTemplate(demo_tokenizer).fingerprint, "False", "False"]]
