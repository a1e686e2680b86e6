"""A checkpoint's tokenizer is found, converted if need be, and is the right one, or is refused."""

import errno
import json
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA_SETS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from polar_xtuner import tokenizer as module
from polar_xtuner.template import REWARD_TOKEN, SEPARATOR_TOKEN, Candidate, PolarTemplate
from polar_xtuner.tokenizer import INTERNLM2_TEXTS, TokenizerError, load_tokenizer, local_folder

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
HOSTILE = [
    *["", " ", "  ", "   ", " a", "  a", "a ", "a  b", "\n", " \n ", "\n\n\n a", "\t a", "\r\n"],
    *["<s>", "</s>", "<unk>", "a<s>b", "< s>", "<s", "<|reward|>", "a <|reward|> b", "<|reward|"],
    *["[UNUSED_TOKEN_130]", "[UNUSED_TOKEN_5]", " [UNUSED_TOKEN_146] x", "[UNUSED_TOKEN_1"],
    *["▁", "▁▁", " ▁ ", "a▁b", "<0x0A>", "<0x00>", "——", "——————", "……", "ＥＦ", "Ｅ Ｆ"],
    *["\0", "a\0b", "\x01\x02\x1f\x7f", "\ufeff", "\ufffd", "\uffff", "\u200b\u200d\u2028\xa0"],
    *[
        "👍🏽",
        "👨‍👩‍👧",
        "é",
        "e\u0301",
        "\U0010ffff",
        "\U000e0001",
        "ﷺ",
        "İ",
        "ẞ",
        "中文 中 文",
        "　",
    ],
]


# A sentencepiece model, written field by field


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def message(*fields: tuple[int, Any]) -> bytes:
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


Piece = tuple[str, float, int]
WORDS = (
    *[
        "▁▁",
        "▁a",
        "ab",
        "▁ab",
        "bc",
        "abc",
        "▁abc",
        "▁▁▁▁",
        "\n\n",
        "\n▁",
        "<s",
        "s>",
        "xy",
        "中文",
    ],
    *["z中", "—a", "aa", "aaa", "aaaa", "▁b", "ba", "aba", "cab", "7▁"],
)
PIECES: list[Piece] = [
    *[("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)],
    *[(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)],
    *[(word, -float(number), NORMAL) for number, word in enumerate(WORDS)],
    *[(letter, -100.0 - n, NORMAL) for n, letter in enumerate("▁abcxyz<s>/é中文7—\n\t")],
    *[(f"[UNUSED_TOKEN_{n}]", 0.0, USER_DEFINED) for n in range(3)],
    *[("——", 0.0, USER_DEFINED), (REWARD_TOKEN, 0.0, USER_DEFINED)],
]
IDS = {text: number for number, (text, _, _) in enumerate(PIECES)}
UNUSED_1 = IDS["[UNUSED_TOKEN_1]"]


def sentencepiece_model(
    pieces: list[Piece] = PIECES,
    trainer: tuple[tuple[int, Any], ...] = ((3, 2), (35, 1), (40, 0), (41, 1), (42, 2), (43, -1)),
    normalizer: tuple[tuple[int, Any], ...] = ((1, "identity"), (3, 0), (4, 0)),
) -> bytes:
    written = [
        (1, message((1, text), (2, score), *([] if kind == NORMAL else [(3, kind)])))
        for text, score, kind in pieces
    ]
    return message(*written, (2, message(*trainer)), (3, message(*normalizer)))


def decoder_of(tokens: dict[str, int]) -> dict[str, Any]:
    """`added_tokens_decoder`, as transformers writes it."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {str(i): {"content": text, **flags, "special": True} for text, i in tokens.items()}


SPECIAL_TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2, REWARD_TOKEN: IDS[REWARD_TOKEN]}


def write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder as POLAR's: no `tokenizer.json`; `<|reward|>` has the id of an unused piece."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    tokens = {**SPECIAL_TOKENS, SEPARATOR_TOKEN: UNUSED_1}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder_of(tokens)})
    return folder


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "polar_xtuner"


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def as_data(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return ids_of(copy, texts)


# Conversion


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "dummy_prefix"])
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """Ours, and what transformers 4 makes of the same sentencepiece model."""
    from transformers import LlamaTokenizerFast

    folder = tmp_path_factory.mktemp("both")
    normalizer = ((3, int(request.param)), (4, 0))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(normalizer=normalizer))
    tokens = {**SPECIAL_TOKENS, SEPARATOR_TOKEN: len(PIECES)}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder_of(tokens)})
    theirs = LlamaTokenizerFast(
        vocab_file=str(folder / "tokenizer.model"),
        legacy=False,
        add_prefix_space=request.param,
        add_bos_token=True,
    )
    special = [SEPARATOR_TOKEN, REWARD_TOKEN]
    theirs.add_special_tokens({"additional_special_tokens": special})
    return load_tokenizer(folder), theirs.backend_tokenizer


def test_a_conversion_is_that_of_transformers_4(both: tuple[Tokenizer, Tokenizer]) -> None:
    ours, theirs = (json.loads(tokenizer.to_str()) for tokenizer in both)
    assert ours == theirs
    assert both[0].encode("a", "b").ids == both[1].encode("a", "b").ids
    assert both[0].encode("a").ids[0] == 1


@settings(max_examples=300)
@given(st.lists(st.text("abcxyz ▁\n\t\r<s>/é中文7—€👍\0", max_size=30), max_size=8))
@example(HOSTILE)
def test_a_conversion_gives_the_ids_of_transformers_4(
    both: tuple[Tokenizer, Tokenizer], texts: list[str]
) -> None:
    ours, theirs = both
    assert ids_of(ours, texts) == ids_of(theirs, texts)
    assert as_data(ours, texts) == as_data(theirs, texts)


@pytest.fixture(scope="module")
def internlm2(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like POLAR's, with InternLM2's `tokenizer.model`; loaded once."""
    folder = tmp_path_factory.mktemp("internlm2")
    data = (shared_data / "internlm2_tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data)
    tokens = {"<unk>": 0, "<s>": 1, "</s>": 2, REWARD_TOKEN: 92527, SEPARATOR_TOKEN: 92544}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder_of(tokens)})
    write_json(folder / "special_tokens_map.json", {"bos_token": "<s>", "pad_token": "</s>"})
    load_tokenizer(folder)
    return folder


def test_internlm2_gets_the_ids_of_transformers_4(
    shared_data: Path, internlm2: Path, internlm2_tokenizer: Any
) -> None:
    ours, theirs = load_tokenizer(internlm2), internlm2_tokenizer.backend_tokenizer
    texts = {*HOSTILE, *map(chr, (*range(0, 0xD800, 7), *range(0xE000, 0x30000, 7)))}
    for name in DATA_SETS:
        for line in (shared_data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for field in ("prompt", "reference", "chosen", "rejected"):
                texts.add("\n".join(turn["content"] for turn in row[field]))
    ordered = sorted(texts)
    assert ids_of(ours, ordered) == ids_of(theirs, ordered)
    assert as_data(ours, HOSTILE) == as_data(theirs, HOSTILE)
    assert json.loads(ours.to_str()) == json.loads(theirs.to_str())


def test_the_built_in_ids_are_those_of_sentencepiece(shared_data: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    truth = SentencePieceProcessor(str(shared_data / "internlm2_tokenizer.model"))
    assert {text: truth.encode(text) for text in INTERNLM2_TEXTS} == INTERNLM2_TEXTS
    for piece, number in module.INTERNLM2_PIECES.items():
        assert truth.id_to_piece(number) == piece


def test_no_content_yields_a_special_token_through_the_template(tiny: Path) -> None:
    candidates = [Candidate(p, r, o) for p in HOSTILE[:30:5] for r, o in zip(HOSTILE, HOSTILE[9:])]
    made = PolarTemplate(load_tokenizer(tiny), 400, 100).encode(candidates)
    assert made == PolarTemplate(load_tokenizer(tiny), 400, 100).encode(candidates), "as read"
    special = (1, 2, UNUSED_1, IDS[REWARD_TOKEN])
    for ids in made:
        assert [ids.count(token) for token in special] == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (sentencepiece_model(trainer=((3, 1), (35, 1))), "UNIGRAM"),
        (sentencepiece_model(trainer=((35, 1),)), "UNIGRAM"),
        (sentencepiece_model(trainer=((3, 4),)), "CHAR"),
        (sentencepiece_model(trainer=((3, 2), (24, 1))), "treat_whitespace_as_suffix"),
        (sentencepiece_model(normalizer=((2, b"\1\2"), (4, 0))), "precompiled_charsmap"),
        (sentencepiece_model(normalizer=((3, 0),)), "remove_extra_whitespaces"),
        (sentencepiece_model(normalizer=((4, 0), (5, 0))), "does not escape whitespaces"),
        (sentencepiece_model([*PIECES, ("q", -5.0, UNUSED)]), "unused pieces, the first 'q'"),
        (sentencepiece_model([*PIECES, ("ab", -5.0, NORMAL)]), "'ab' has two ids"),
        (sentencepiece_model(PIECES[1:]), "no piece is the unknown one"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (b"", "no piece is the unknown one"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(tiny: Path, model: bytes, name: str) -> None:
    (tiny / "tokenizer.model").write_bytes(model)
    with pytest.raises(TokenizerError, match=name) as caught:
        load_tokenizer(tiny)
    assert str(tiny) in str(caught.value)
    assert not (tiny / "tokenizer.json").exists()


def test_a_model_that_is_cut_short_is_refused(tiny: Path) -> None:
    model = sentencepiece_model()
    for size in range(0, len(model), 61):
        (tiny / "tokenizer.model").write_bytes(model[:size])
        with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
            load_tokenizer(tiny)


# Where the conversion is kept


def refuse_writing(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Root may write everywhere, so a read-only file system is played."""
    write = module._write

    def refusing(file: Path, text: str) -> None:
        if any(folder in file.parents for folder in folders):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))
        write(file, text)

    monkeypatch.setattr(module, "_write", refusing)


def test_a_conversion_is_written_beside_its_source_once(
    tiny: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name for file in tiny.iterdir()}
    made = load_tokenizer(tiny)
    assert {file.name for file in tiny.iterdir()} == before | {"tokenizer.json"}
    assert not cache_home.exists()
    monkeypatch.setattr(module, "_convert", None)
    assert load_tokenizer(tiny).to_str() == made.to_str()


def test_a_folder_that_cannot_be_written_to_has_its_conversion_in_the_cache(
    tiny: Path,
    cache_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refuse_writing(monkeypatch, tiny)
    made = load_tokenizer(tiny)
    (file,) = cache_home.glob("*/tokenizer.json")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(file) in caplog.text and str(tiny) in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(module, "_convert", None)
        assert load_tokenizer(tiny).to_str() == made.to_str()
    assert len(caplog.records) == 1

    file.write_text("{")
    with pytest.raises(TokenizerError, match=r"remove .*cache.*tokenizer.json"):
        load_tokenizer(tiny)

    tokens = {**SPECIAL_TOKENS, SEPARATOR_TOKEN: UNUSED_1 + 1}
    write_json(tiny / "tokenizer_config.json", {"added_tokens_decoder": decoder_of(tokens)})
    assert load_tokenizer(tiny).token_to_id(SEPARATOR_TOKEN) == UNUSED_1 + 1


def test_without_any_place_to_write_the_conversion_still_serves(
    tiny: Path,
    cache_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refuse_writing(monkeypatch, tiny, cache_home)
    assert load_tokenizer(tiny).to_str() == load_tokenizer(tiny).to_str()
    assert "converted every time" in caplog.text


def test_a_full_disk_leaves_nothing_behind(small_disk: Path, tiny: Path, cache_home: Path) -> None:
    folder = small_disk / "model"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    room = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(room.f_bavail * room.f_bsize))
    load_tokenizer(folder)
    assert {file.name for file in folder.iterdir()} == {file.name for file in tiny.iterdir()}
    assert [*cache_home.glob("*/tokenizer.json")]


# Special tokens


def test_a_special_token_takes_the_place_of_a_user_defined_piece(tiny: Path) -> None:
    for _ in ("converted", "read"):
        tokenizer = load_tokenizer(tiny)
        assert ids_of(tokenizer, [SEPARATOR_TOKEN]) == [[UNUSED_1]]
        assert tokenizer.get_vocab_size() == len(PIECES)
        assert UNUSED_1 not in ids_of(tokenizer, ["[UNUSED_TOKEN_1]"])[0]
        assert ids_of(tokenizer, ["[UNUSED_TOKEN_2]"]) == [[UNUSED_1 + 1]]
        assert UNUSED_1 not in as_data(tokenizer, [SEPARATOR_TOKEN])[0]


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ({SEPARATOR_TOKEN: IDS["abc"]}, "'abc'"),
        ({SEPARATOR_TOKEN: 0}, "'<unk>'"),
        ({SEPARATOR_TOKEN: len(PIECES) + 7}, rf"the id {len(PIECES)}, .* says {len(PIECES) + 7}"),
        ({"abc": UNUSED_1}, "'abc' has two ids"),
    ],
)
def test_an_id_that_a_token_cannot_have_is_an_error(
    tiny: Path, tokens: dict[str, int], found: str
) -> None:
    write_json(tiny / "tokenizer_config.json", {"added_tokens_decoder": decoder_of(tokens)})
    with pytest.raises(TokenizerError, match=found) as caught:
        load_tokenizer(tiny)
    assert str(tiny) in str(caught.value) and "tokenizer_config.json" in str(caught.value)


def fast_only(folder: Path, tokenizer: Tokenizer | None = None) -> Path:
    """A folder with nothing but a `tokenizer.json`."""
    if tokenizer is None:
        tokens = {text: number for number, text in enumerate(["<unk>", "<s>", "▁", *"abxyz中7\n"])}
        tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[], unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        tokenizer.add_special_tokens(["<unk>", "<s>"])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_tokens_that_only_other_files_name_are_added_with_their_ids(tmp_path: Path) -> None:
    folder = fast_only(tmp_path / "fast")
    config = {"added_tokens_decoder": decoder_of({"<s>": 1, "<|a|>": 11}), "eos_token": "<s>"}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "added_tokens.json", {"<|b|>": 13, "<|c|>": 12})
    special = {"pad_token": {"content": "<|c|>"}, "additional_special_tokens": ["<|d|>", "z"]}
    write_json(folder / "special_tokens_map.json", special)
    tokenizer = load_tokenizer(folder)
    added = tokenizer.get_added_tokens_decoder()
    names = {number: token.content for number, token in added.items()}
    assert names == {
        **{0: "<unk>", 1: "<s>", 7: "z"},
        **{11: "<|a|>", 12: "<|c|>", 13: "<|b|>", 14: "<|d|>"},
    }
    assert [n for n, token in added.items() if not token.special] == [13]
    assert as_data(tokenizer, ["<|d|>"]) != [[14]] and ids_of(tokenizer, ["<|d|>"]) == [[14]]


def test_a_vocabulary_that_knows_a_special_token_as_text_learns_better(tmp_path: Path) -> None:
    folder = fast_only(tmp_path / "fast")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(REWARD_TOKEN, normalized=False)])
    fast_only(folder, tokenizer)
    assert as_data(load_tokenizer(folder), [REWARD_TOKEN]) == [[11]]
    decoder = decoder_of({REWARD_TOKEN: 11})
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    loaded = load_tokenizer(folder)
    assert ids_of(loaded, [REWARD_TOKEN]) == [[11]] and 11 not in as_data(loaded, [REWARD_TOKEN])[0]


def test_files_that_contradict_each_other_are_an_error(tiny: Path) -> None:
    load_tokenizer(tiny)
    tokens = {**SPECIAL_TOKENS, SEPARATOR_TOKEN: UNUSED_1 + 1}
    write_json(tiny / "tokenizer_config.json", {"added_tokens_decoder": decoder_of(tokens)})
    wanted = rf"the id {UNUSED_1}, .*tokenizer_config.json beside it says {UNUSED_1 + 1}.*remove"
    with pytest.raises(TokenizerError, match=wanted):
        load_tokenizer(tiny)
    (tiny / "tokenizer.json").unlink()
    assert load_tokenizer(tiny).token_to_id(SEPARATOR_TOKEN) == UNUSED_1 + 1


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "text", ["{", "[]", '{"added_tokens_decoder": {"x": 1}, "bos_token": 3}', '{"bos_token": [3]}']
)
def test_a_damaged_file_of_names_is_an_error(tiny: Path, name: str, text: str) -> None:
    (tiny / name).write_text(text)
    with pytest.raises(TokenizerError, match=name):
        load_tokenizer(tiny)


# What is read as it is


def test_a_saved_tokenizer_is_read_as_transformers_reads_it(
    tmp_path: Path, demo_tokenizer: Any
) -> None:
    demo_tokenizer.save_pretrained(tmp_path)
    theirs = demo_tokenizer.backend_tokenizer
    assert load_tokenizer(tmp_path).to_str() == theirs.to_str()


def test_truncation_and_padding_are_left_out(tmp_path: Path) -> None:
    folder = fast_only(tmp_path / "fast")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain = tokenizer.to_str()
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=8)
    fast_only(folder, tokenizer)
    assert load_tokenizer(folder).to_str() == plain


def test_a_damaged_tokenizer_json_is_an_error(tiny: Path) -> None:
    (tiny / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TokenizerError, match=r"tokenizer.json cannot be read .* remove"):
        load_tokenizer(tiny)


def test_a_folder_without_a_tokenizer_says_what_it_has_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="but nothing"):
        load_tokenizer(tmp_path)
    write_json(tmp_path / "config.json", {})
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(tmp_path)
    for part in (str(tmp_path), "but config.json", "transformers 4", ".save_pretrained("):
        assert part in str(caught.value)


# The check of what was loaded


def without_spaces(settings: dict[str, Any]) -> None:
    pattern = {"type": "Replace", "pattern": {"String": " "}, "content": ""}
    settings.update(normalizer=pattern, pre_tokenizer=None)


def split_at_spaces(settings: dict[str, Any]) -> None:
    settings["pre_tokenizer"] = {"type": "Whitespace"}


def split_by_bytes(settings: dict[str, Any]) -> None:
    """Bytes are no pieces of such a vocabulary, and its models drop what they do not know."""
    options = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    settings["pre_tokenizer"] = {"type": "ByteLevel", **options}
    settings["model"].update(unk_token=None, byte_fallback=False)


@pytest.mark.parametrize("damage", [without_spaces, split_at_spaces, split_by_bytes])
def test_a_tokenizer_that_drops_spaces_is_refused(
    tiny: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    load_tokenizer(tiny)
    file = tiny / "tokenizer.json"
    settings = json.loads(file.read_text())
    damage(settings)
    write_json(file, settings)
    with pytest.raises(TokenizerError, match="drops spaces") as caught:
        load_tokenizer(tiny)
    assert f"remove {file}, and it is made anew from tokenizer.model" in str(caught.value)
    (tiny / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match=f"remove {file} .* under transformers 4"):
        load_tokenizer(tiny)
    file.unlink()


def prefixed(settings: dict[str, Any]) -> None:
    """As transformers 5.19 writes it if the config does not say `add_prefix_space: false`."""
    settings["pre_tokenizer"]["prepend_scheme"] = "first"


def normalised(settings: dict[str, Any]) -> None:
    settings["normalizer"] = {"type": "NFKC"}


def without_bytes(settings: dict[str, Any]) -> None:
    settings["model"]["byte_fallback"] = False


def without_merges(settings: dict[str, Any]) -> None:
    del settings["model"]["merges"][1000:]


@pytest.mark.parametrize(
    "damage",
    [without_spaces, split_at_spaces, split_by_bytes, prefixed, normalised, without_bytes,
     without_merges],
)  # fmt: skip
def test_a_wrong_tokenizer_with_internlm2s_vocabulary_is_refused(
    internlm2: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    settings = json.loads((internlm2 / "tokenizer.json").read_text())
    damage(settings)
    write_json(tmp_path / "tokenizer.json", settings)
    with pytest.raises(TokenizerError, match=r"drops spaces|has InternLM2's vocabulary but"):
        load_tokenizer(tmp_path)


# Folders and hub names


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == tmp_path
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is a file: give the folder"):
        local_folder(tmp_path / "tokenizer.json")


def offline(hub: Path, name: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from polar_xtuner.tokenizer import *; print(local_folder(sys.argv[1]))"
    return subprocess.run(
        [sys.executable, "-c", code, name],
        env={**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", ["nobody/nothing", "/no/such/folder", "./a b"])
def test_a_name_that_leads_nowhere_is_an_error_that_says_so(tmp_path: Path, name: str) -> None:
    out = offline(tmp_path, name)
    assert out.returncode == 1
    message = out.stderr.splitlines()[-1]
    assert message.startswith("polar_xtuner.tokenizer.TokenizerError")
    assert name in message and "is no folder here" in message and "give its folder" in message


def test_a_hub_name_that_is_cached_needs_no_network(tmp_path: Path, tiny: Path) -> None:
    repository = tmp_path / "hub" / "models--internlm--POLAR-7B"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    tiny.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    out = offline(tmp_path, "internlm/POLAR-7B")
    assert out.stdout.strip() == str(snapshot), out.stderr


def test_only_small_files_come_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert local_folder("internlm/POLAR-7B") == tmp_path
    ((name, patterns),) = asked
    assert name == "internlm/POLAR-7B"
    assert {"tokenizer.model", "tokenizer_config.json", "config.json"} < {*patterns}
    assert "polar_golden.json" in patterns
    assert not any(p.endswith((".py", ".bin", ".safetensors")) or "*" in p for p in patterns)


def test_neither_import_nor_conversion_needs_more_than_the_base_install(tiny: Path) -> None:
    code = (
        "import sys; from polar_xtuner.tokenizer import load_tokenizer; "
        "load_tokenizer(sys.argv[1]); print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in out.stdout.split()}
    heavy = {"torch", "transformers", "sentencepiece", "xtuner", "google", "huggingface_hub"}
    assert "tokenizers" in loaded and not loaded & heavy
