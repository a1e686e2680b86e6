"""A checkpoint's folder or hub name -> a `tokenizers.Tokenizer` that is sure to be the right one.

`tokenizer.json` is read where there is one. POLAR's own folders have none, but `tokenizer.model`, a
sentencepiece BPE; it is converted once (in seconds) and kept as `tokenizer.json`, which every
program reads alike. The ids are those of transformers 4's
`LlamaTokenizerFast(vocab_file=..., legacy=False, add_prefix_space=False)`: every way to cut a piece
into two others is a merge, ranked by the score of the piece.

Special tokens are named, with their ids, in the files beside these two. Where such a token has the
id of a user-defined piece ("[UNUSED_TOKEN_5]"), it takes the piece's place.

What was loaded is then tried on a few texts: transformers 5 can write a `tokenizer.json` that
drops spaces, and scores would be wrong without any other sign.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

logger = logging.getLogger(__name__)

FAST, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FILES = (FAST, SENTENCEPIECE, CONFIG, SPECIAL, ADDED, "config.json", "polar_golden.json")
"""What `local_folder` fetches from the hub."""

ROLES = [f"{role}_token" for role in ("unk", "bos", "eos", "pad", "sep", "cls", "mask")]
ROLES.append("additional_special_tokens")
"""Where the config and the map have special tokens without their ids."""

CONVERSION_VERSION = 1
"""Part of the name of a cached conversion: raise it whenever the result would be another."""

INTERNLM2_PIECES = {"▁▁": 387, "\n\n": 402, "中文": 69093, "——": 92395}
"""A vocabulary that has these is InternLM2's."""

INTERNLM2_TEXTS = {
    "Ada has 12 apples, doesn't she?": [
        *(2749, 264, 834, 262, 845, 40416, 328, 3336, 1082, 1486, 345)
    ],
    " leading": [6543],
    "  two\n\n": [387, 19963, 402],
    "天空为什么是蓝色的？——因为散射。": [
        *(73010, 68543, 60357, 78562, 60504, 92395, 68268, 61331, 61352, 60355)
    ],
    "def f(x):\n\tif x:\n        return  x + 1\n": [
        *(882, 413, 2226, 1122, 876, 991, 642, 391, 821, 387, 274, 619, 262, 312, 364)
    ],
    "3.14159 2048": [308, 281, 1101, 10981, 262, 638, 2271],
    "👍🏽 é\u200bЖ": [243, 162, 148, 144, 243, 162, 146, 192, 262, 63000, 62945, 67718],
}
"""Texts with the ids that InternLM2's `tokenizer.model` gives them, by sentencepiece itself."""

SPACED_TEXTS = {"a b": "ab", "z 中": "z中", "中 7": "中7", "x\ny": "xy"}
"""Texts and what is left of them without their spaces; not in all can a merge hide the loss."""


class TokenizerError(ValueError):
    """A tokenizer that cannot be had, or not be trusted; the message says what to do."""


def local_folder(path: str | Path) -> Path:
    """A folder as it is, or the hub's copy of a checkpoint's small files (`FILES`).

    Raises:
        TokenizerError: `path` is neither a folder nor a hub name that can be reached or is cached.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise TokenizerError(f"{folder} is a file: give the folder that it is in")
    from huggingface_hub import snapshot_download  # takes longer to import than all else here

    try:
        return Path(snapshot_download(str(path), allow_patterns=[*FILES]))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TokenizerError(
            f"{path} is no folder here, and its files could not be had from the Hugging Face hub "
            f"({reason}): check the name, or fetch the checkpoint and give its folder"
        ) from error


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint, with all its special tokens, without truncation or padding.

    Where only `tokenizer.model` is there, `tokenizer.json` is written into the folder or, if that
    cannot be written to, into `$XDG_CACHE_HOME/polar_xtuner`.

    Args:
        path: a Hugging Face folder or hub name.

    Raises:
        TokenizerError: there is no tokenizer, its files are damaged or contradict each other, it
            is of a kind that cannot be converted, or it fails the check of what was loaded.
    """
    folder = local_folder(path)
    tokens = _named_tokens(folder)
    file = folder / FAST
    if not file.is_file() and (folder / SENTENCEPIECE).is_file():
        file = _cached(folder)
        if not file.is_file():
            return _converted(folder, tokens)
    if not file.is_file():
        raise _nothing_in(folder)
    tokenizer = _read_fast(file)
    _add_tokens(tokenizer, tokens, file)
    _check(tokenizer, file)
    return tokenizer


def _read_fast(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower one
        raise TokenizerError(
            f"{file} cannot be read ({error}): it is damaged, or of a newer version of tokenizers; "
            f"{_remedy(file)}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _nothing_in(folder: Path) -> TokenizerError:
    found = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
    return TokenizerError(
        f"{folder} has neither {FAST} nor {SENTENCEPIECE}, but {found}. Put the base checkpoint's "
        f"files there, or write {FAST} once under transformers 4: {_by_transformers(folder)}"
    )


def _by_transformers(folder: Path) -> str:
    name = repr(str(folder))
    return (
        f"from transformers import AutoTokenizer as T; "
        f"T.from_pretrained({name}, trust_remote_code=True).save_pretrained({name})"
    )


def _remedy(file: Path) -> str:
    """What to do about a bad `tokenizer.json`."""
    if file.name != FAST:
        return f"fetch {file} anew, or convert it once under transformers 4"
    if file.parent.parent == _cache() or (file.parent / SENTENCEPIECE).is_file():
        return f"remove {file}, and it is made anew from {SENTENCEPIECE}"
    return (
        f"remove {file} and put the base checkpoint's {SENTENCEPIECE} in its place, or write it "
        f"once under transformers 4 from the base checkpoint"
    )


# Special tokens


class _Token(NamedTuple):
    """A token that a file names, with its id if the file gives one."""

    token: AddedToken
    id: int | None
    file: str


def _named_tokens(folder: Path) -> list[_Token]:
    """What the files beside a tokenizer name, those with ids first, in order of ids."""
    config, special_map, added = (_read_json(folder / name) for name in (CONFIG, SPECIAL, ADDED))
    try:
        special = {
            token.content: _Token(token, None, name)
            for name, values in ((SPECIAL, special_map), (CONFIG, config))
            for token in _special_tokens(values)
        }
        with_ids = {}
        for text, number in added.items():
            token = special[text].token if text in special else AddedToken(text, normalized=True)
            with_ids[text] = _Token(token, int(number), ADDED)
        for number, fields in (config.get("added_tokens_decoder") or {}).items():
            token = _added_token(fields)
            token.special |= token.content in special
            with_ids[token.content] = _Token(token, int(number), CONFIG)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{folder}: the tokens in {CONFIG}, {SPECIAL} or {ADDED} are not in the form that "
            f"transformers writes ({error!r}): fetch these files anew"
        ) from error
    return [
        *sorted(with_ids.values(), key=lambda named: named.id or 0),
        *(named for text, named in special.items() if text not in with_ids),
    ]


def _special_tokens(values: dict[str, Any]) -> Iterator[AddedToken]:
    for role in ROLES:
        token = values.get(role) or []
        for fields in token if isinstance(token, list) else [token]:
            fields = {"content": fields} if isinstance(fields, str) else fields
            yield _added_token({**fields, "special": True})


def _added_token(fields: dict[str, Any]) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(fields["content"], **{flag: bool(fields.get(flag)) for flag in flags})


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file} is no JSON ({error}): fetch it anew") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{file} holds no JSON object: fetch it anew")
    return values


def _add_tokens(tokenizer: Tokenizer, tokens: list[_Token], file: Path) -> None:
    """Add what is missing; a file that gives an id settles how its token is matched, too."""
    known = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    missing = [t for t in tokens if t.id is not None or t.token.content not in known]
    tokenizer.add_tokens([named.token for named in missing])
    for named in missing:
        found = tokenizer.token_to_id(named.token.content)
        if named.id is not None and found != named.id:
            raise TokenizerError(
                f"{file} gives {named.token.content!r} the id {found}, but {named.file} beside it "
                f"says {named.id}. If {named.file} is the base checkpoint's, {_remedy(file)}"
            )


# The check of what was loaded


def _check(tokenizer: Tokenizer, file: Path) -> None:
    """Raise TokenizerError if texts do not have the ids that they should have."""

    def ids_of(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    for text, joined in SPACED_TEXTS.items():
        if ids_of(text) == ids_of(joined):
            raise TokenizerError(
                f"{file} drops spaces: {text!r} has the ids of {joined!r}, {ids_of(text)}. "
                f"transformers 5 can write such a file: {_remedy(file)}"
            )
    if all(tokenizer.token_to_id(piece) == i for piece, i in INTERNLM2_PIECES.items()):
        for text, ids in INTERNLM2_TEXTS.items():
            if ids_of(text) != ids:
                raise TokenizerError(
                    f"{file} has InternLM2's vocabulary but does not split text as InternLM2 does: "
                    f"{text!r} has the ids {ids_of(text)}, they should be {ids}. "
                    f"transformers 5 can write such a file: {_remedy(file)}"
                )


# Conversion of tokenizer.model


def _converted(folder: Path, tokens: list[_Token]) -> Tokenizer:
    """Made from `tokenizer.model`, checked, and kept for the next time."""
    source = folder / SENTENCEPIECE
    tokenizer = _convert(_read_sentencepiece(source), tokens, source)
    _add_tokens(tokenizer, tokens, source)
    _check(tokenizer, source)
    text = tokenizer.to_str()
    try:
        _write(folder / FAST, text)
        logger.info("made %s from %s", folder / FAST, SENTENCEPIECE)
    except OSError as error:
        file = _cached(folder)
        try:
            _write(file, text)
            logger.warning("%s cannot be written to (%s): made %s instead", folder, error, file)
        except OSError as second:
            logger.warning(
                "%s is converted every time: neither %s (%s) nor %s (%s) can be written to",
                *(source, folder, error, file.parent, second),
            )
    return tokenizer


def _convert(model: _Model, tokens: list[_Token], source: Path) -> Tokenizer:
    pieces = _renamed(model.pieces, tokens, source)
    numbers = {piece.text: number for number, piece in enumerate(pieces)}
    if len(numbers) < len(pieces):
        twice = next(p.text for number, p in enumerate(pieces) if numbers[p.text] != number)
        raise TokenizerError(f"{source}: {twice!r} has two ids, counting what {CONFIG} names")
    ordinary = {
        new.text: new.score for old, new in zip(model.pieces, pieces) if old.text == new.text
    }
    tokenizer = Tokenizer(
        BPE(
            vocab=numbers,
            merges=_merges(ordinary),
            unk_token=next(piece.text for piece in pieces if piece.kind == _Kind.UNKNOWN),
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    scheme = "first" if model.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.text, normalized=False, special=piece.kind != _Kind.USER_DEFINED)
            for piece in pieces
            if piece.kind in (_Kind.UNKNOWN, _Kind.CONTROL, _Kind.USER_DEFINED)
        ]
    )
    if model.bos_id < len(pieces):
        bos = pieces[model.bos_id].text
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, model.bos_id)],
        )
    return tokenizer


def _renamed(pieces: list[_Piece], tokens: list[_Token], source: Path) -> list[_Piece]:
    """The pieces, special tokens in the places that they take."""
    pieces = [*pieces]
    for named in tokens:
        if named.id is None or not 0 <= named.id < len(pieces):
            continue
        piece, text = pieces[named.id], named.token.content
        if piece.text != text and piece.kind not in (_Kind.CONTROL, _Kind.USER_DEFINED):
            raise TokenizerError(
                f"{named.file} gives {text!r} the id {named.id}, which is that of the piece "
                f"{piece.text!r} in {source}: these files do not belong together"
            )
        pieces[named.id] = piece._replace(text=text)
    return pieces


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece: best score first, then the longest left part."""
    numbers = {piece: number for number, piece in enumerate(scores)}
    merges = [
        (left, right)
        for piece in scores
        for left, right in sorted(
            (
                (piece[:cut], piece[cut:])
                for cut in range(1, len(piece))
                if piece[:cut] in numbers and piece[cut:] in numbers
            ),
            key=lambda pair: (numbers[pair[0]], numbers[pair[1]]),
        )
    ]
    return sorted(
        merges,
        key=lambda pair: (scores[pair[0] + pair[1]], len(pair[0]), len(pair[1])),
        reverse=True,
    )


def _write(file: Path, text: str) -> None:
    """Whole or not at all: other ranks may be reading, or writing the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.urandom(4).hex()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "polar_xtuner"


def _cached(folder: Path) -> Path:
    """Where the conversion is kept if the folder cannot be written to."""
    digest = hashlib.sha256(b"%d" % CONVERSION_VERSION)
    for name in (SENTENCEPIECE, CONFIG, SPECIAL, ADDED):
        data = (folder / name).read_bytes() if (folder / name).is_file() else b""
        digest.update(hashlib.sha256(data).digest())
    return _cache() / f"tokenizer-{digest.hexdigest()}" / FAST


# The file format: https://github.com/google/sentencepiece, src/sentencepiece_model.proto


class _Kind(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


class _Model(NamedTuple):
    pieces: list[_Piece]
    bos_id: int
    byte_fallback: bool
    add_dummy_prefix: bool


MODEL_TYPES = {1: "UNIGRAM", 2: "BPE", 3: "WORD", 4: "CHAR"}


def _read_sentencepiece(file: Path) -> _Model:
    try:
        fields = [*_fields(file.read_bytes())]
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer, normalizer = (
            {key: v for number, value in fields if number == part for key, v in _fields(value)}
            for part in (2, 3)
        )
        if not any(piece.kind == _Kind.UNKNOWN for piece in pieces):
            raise ValueError("no piece is the unknown one")
    except (TypeError, ValueError, struct.error) as error:
        raise TokenizerError(
            f"{file} is no sentencepiece model, or is cut short ({error}): fetch it anew (a file "
            "of a few lines of text is a Git LFS pointer)"
        ) from error
    model_type = trainer.get(3, 1)
    unused = next((piece.text for piece in pieces if piece.kind == _Kind.UNUSED), None)
    for refused, what in (
        (model_type != 2, f"is of model_type {MODEL_TYPES.get(model_type, model_type)}, not BPE"),
        (trainer.get(24, 0), "has treat_whitespace_as_suffix"),
        (normalizer.get(2), "has a precompiled_charsmap, which rewrites characters"),
        (normalizer.get(4, 1), "has remove_extra_whitespaces"),
        (not normalizer.get(5, 1), "does not escape whitespaces"),
        (unused is not None, f"has unused pieces, the first {unused!r}"),
    ):
        if refused:
            raise TokenizerError(
                f"{file} {what}: this cannot be converted here. Write {FAST} once under "
                f"transformers 4: {_by_transformers(file.parent)}"
            )
    return _Model(pieces, trainer.get(41, 1), bool(trainer.get(35, 0)), bool(normalizer.get(3, 1)))


def _piece(data: bytes) -> _Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return _Piece(fields[1].decode() if 1 in fields else "", score, fields.get(3, _Kind.NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message's fields: varints as int, all else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, at = _varint(data, at)
        elif key & 7 in (1, 5):
            size = 8 if key & 7 == 1 else 4
        else:
            raise ValueError(f"wire type {key & 7} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"{at + size - len(data)} bytes are missing")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a number is cut short")
