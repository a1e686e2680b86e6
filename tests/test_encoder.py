"""Encoding word by word changes no id: the plain way is one call of the tokenizer a text."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA_SETS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from polar_xtuner import encoder
from polar_xtuner.encoder import FastEncoder, encoder_of

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = "abcdeé中"
MERGES = [
    *["a b", "ab c", "▁ a", "▁a b", "▁ ▁", "▁▁ ▁▁", "\n \n", "\n ▁", "\t ▁", ". \n", "< s", "<s >"],
    *["中 a", "c d", "cd e", "▁ cd", "\n\n \n"],
]


def bpe(merges: list[str] = MERGES, **options: Any) -> Tokenizer:
    """Sentencepiece's way on a small alphabet, with bytes for all other characters."""
    symbols = [*LETTERS, "▁", "\n", "\t", ".", "<", "s", ">"]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *symbols]
    tokens += [t for t in (m.replace(" ", "") for m in merges) if t not in tokens]
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, **options}
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[tuple(m.split(" ")) for m in merges], **options)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def plainly(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return [copy.encode(text, add_special_tokens=False).ids for text in texts]


texts = st.lists(st.text(f"{LETTERS} ▁\n\t\r.<s>é€日", max_size=30), max_size=8)


@settings(max_examples=300)
@given(texts)
@example(
    ["a  b\n  c", " a", "a ", "   ", "", "\n ", "\n\n\n a", "\t  a. \n", "ab ab ab", "<s> </s>"]
)
def test_words_have_the_ids_of_the_text(texts: list[str]) -> None:
    tokenizer = bpe()
    ours = encoder_of(tokenizer)
    assert ours._word is not None
    assert ours.encode(texts) == plainly(tokenizer, texts)
    assert ours.encode(texts) == plainly(tokenizer, texts), "remembered words"
    for text, ids in zip(texts, ours.encode(texts)):
        assert "".join(ours._word.findall(text)) == text
        assert len(ids) <= ours.most_ids(text)


@settings(max_examples=300)
@given(st.text(f"{LETTERS} \n.€日", max_size=8), st.text(f"{LETTERS} \n.€日", max_size=8))
def test_separable_texts_have_their_ids_one_after_the_other(left: str, right: str) -> None:
    tokenizer = bpe()
    if encoder_of(tokenizer).separable(left, right):
        whole, first, second = plainly(tokenizer, [left + right, left, right])
        assert whole == first + second


def test_an_answer_is_separable_from_the_newline_before_it(internlm2_tokenizer: Any) -> None:
    ours = encoder_of(internlm2_tokenizer)
    assert all(ours.separable("Why?\n", answer) for answer in ("Because", "42", "因为", "", "(a)"))
    assert not any(ours.separable("Why?\n", answer) for answer in ("\nBecause", " 42", "\t"))
    assert not ours.separable("Wh", "y")


@pytest.mark.parametrize("name", DATA_SETS)
def test_real_texts_have_the_ids_of_one_call_a_text(
    name: str, shared_data: Path, internlm2_tokenizer: Any
) -> None:
    lines = (shared_data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:400]
    rows = [json.loads(line) for line in lines]
    texts = [
        "\n".join(message["content"] for message in row[field])
        for row in rows
        for field in ("prompt", "reference", "chosen", "rejected")
    ]
    ours = encoder_of(internlm2_tokenizer)
    assert isinstance(ours, FastEncoder) and ours._word is not None
    assert ours.encode(texts) == plainly(internlm2_tokenizer.backend_tokenizer, texts)


def prepending() -> Tokenizer:
    tokenizer = bpe()
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def stripping() -> Tokenizer:
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), tokenizer.normalizer])
    return tokenizer


def splitting_before() -> Tokenizer:
    tokenizer = bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer


def reaching_over_spaces() -> Tokenizer:
    return bpe([*MERGES, "a ▁", "a▁ b", "é ▁a"])


def merging_bytes() -> Tokenizer:
    return bpe([*MERGES, "<0xE2> <0x82>", "<0xAC> ▁"])


def taking_whole_words() -> Tokenizer:
    return bpe([*MERGES, "b ▁a"], ignore_merges=True)


def with_a_greedy_token() -> Tokenizer:
    tokenizer = bpe()
    tokenizer.add_tokens([AddedToken("ab", lstrip=True, rstrip=True, normalized=False)])
    return tokenizer


def with_a_token_of_two_words() -> Tokenizer:
    tokenizer = bpe()
    tokenizer.add_tokens([AddedToken("ab a", normalized=False), AddedToken("b c", normalized=True)])
    return tokenizer


def of_words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "ab": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [prepending, stripping, splitting_before, reaching_over_spaces, merging_bytes,
     taking_whole_words, with_a_greedy_token, with_a_token_of_two_words, of_words],
)  # fmt: skip
@settings(max_examples=60)
@given(texts)
@example(["a b a ba€ b", " ab  ab ", "é a", "ab ▁a"])
def test_whatever_the_tokenizer_does_the_ids_are_its_own(make: Any, texts: list[str]) -> None:
    tokenizer = make()
    ours = encoder_of(tokenizer)
    assert ours.encode(texts) == plainly(tokenizer, texts)
    for left in texts[:3]:
        for right in texts[:3]:
            if ours.separable(left, right):
                whole, first, second = plainly(tokenizer, [left + right, left, right])
                assert whole == first + second


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "REMEMBERED_WORDS", 20)
    tokenizer = bpe()
    ours = encoder_of(tokenizer)
    for start in range(0, 200, 10):
        texts = [f"{chr(0x4E00 + start + i)} {'ab' * 40}{i}" for i in range(10)]
        assert ours.encode(texts) == plainly(tokenizer, texts)
        assert len(ours._memo) <= 40
        assert all(len(word) <= encoder.LONGEST_WORD for word in ours._memo)


def test_threads_may_share_an_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "REMEMBERED_WORDS", 5)
    tokenizer = bpe()
    ours = encoder_of(tokenizer)
    batches = [[f"{'ab' * 50} {'中' * 70} a{number % 7}"] * 3 for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(ours.encode, batches)]
    assert found == [plainly(tokenizer, batch) for batch in batches]
