import gzip
import json
import math
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_xtuner.records import (
    BadRow,
    BadRowsError,
    Row,
    RowCheck,
    RowError,
    find_files,
    map_rows,
    parse_row,
    read_rows,
    text_of,
)

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

DATA = Path(__file__).parents[2] / "shared" / "data"
BOM = b"\xef\xbb\xbf"

WORDS = [
    "the",
    "cat",
    "sat",
    "7 * 6 = 42",
    "naïve",
    "Zürich",
    "东京",
    "мир",
    "🎉",
    "\\frac{1}{2}",
    "\n\n",
]
WORDS += [
    "\t",
    "`x`",
    "<rm>",
    "\x00",
    "\x1b",
    "\u2028",
    "e\u0301",
    "<|reward|>",
    "null",
    "{}",
    "[]",
    '"',
    "\\",
]

Raw = dict[str, Any]


def some_text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 25)))


def some_messages(rng: random.Random, role: str = "assistant") -> list[Raw]:
    turns = [role] if rng.random() < 0.7 else [role, "user", role]
    return [{"role": turn, "content": some_text(rng)} for turn in turns]


def some_side(rng: random.Random) -> Any:
    """One candidate or several, as messages or as strings."""
    make: Callable[[], Any] = rng.choice([lambda: some_text(rng), lambda: some_messages(rng)])
    return make() if rng.random() < 0.6 else [make() for _ in range(rng.randint(1, 3))]


def some_row(rng: random.Random) -> Raw:
    row: Raw = {
        "prompt": rng.choice([some_text(rng) + "?", some_messages(rng, "user")]),
        "reference": rng.choice([some_text(rng), some_messages(rng)]),
        "chosen": some_side(rng),
        "rejected": some_side(rng),
    }
    optional: Raw = {
        "wrapper": rng.choice(["sft", "pretrain", None]),
        "source": rng.choice(["gsm8k", None]),
        "id": rng.choice(["q-17", 17, 10**30, None]),
        "margin": rng.choice([0, 1, -2.5, 1e-9, None]),
        "question_id": rng.randrange(1000),
        "annotators": [1, 2, None],
        "output": rng.choice(["an output", 3]),
    }
    row |= {name: value for name, value in optional.items() if rng.random() < 0.4}
    return dict(rng.sample(list(row.items()), len(row)))


def good_rows(count: int, seed: int = 0) -> list[Raw]:
    rng = random.Random(seed)
    rows = (some_row(rng) for _ in range(10 * count))
    return [row for row in rows if meaning_of(row) is not None][:count]


# What a row means, derived once more and plainly: None if it is bad.


def meaning_of(raw: Any, scoring: bool = False) -> Raw | None:
    try:
        return _meaning(raw, scoring)
    except (KeyError, TypeError, ValueError, OverflowError, AssertionError):
        return None


def _meaning(raw: Any, scoring: bool) -> Raw:
    assert type(raw) is dict
    used = {"prompt", "reference", "wrapper", "source", "id", "margin"}
    prompt, reference = _plain(raw["prompt"]), _plain(raw["reference"])
    assert prompt
    chosen: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    if scoring and raw.get("output") is not None:
        outputs = _candidates(raw["output"])
        used.add("output")
    else:
        chosen, rejected = _candidates(raw["chosen"]), _candidates(raw["rejected"])
        assert not set(chosen) & set(rejected)
        used |= {"chosen", "rejected"}
    wrapper, margin, id = raw.get("wrapper"), raw.get("margin"), raw.get("id")
    assert wrapper in (None, "sft", "pretrain")
    assert margin is None or type(margin) in (int, float)
    assert margin is None or math.isfinite(float(margin))
    assert id is None or type(id) in (str, int)
    source = raw.get("source")
    return {
        "prompt": prompt,
        "reference": reference,
        "chosen": chosen,
        "rejected": rejected,
        "outputs": outputs,
        "wrapper": wrapper or "sft",
        "source": None if source is None else _plain_string(source),
        "id": None if id is None else _plain_string(str(id)),
        "margin": float(margin or 0),
        "extra": {name: value for name, value in raw.items() if name not in used},
    }


def _plain_string(value: Any) -> str:
    assert type(value) is str
    value.encode("utf-8")
    return value


def _plain(value: Any) -> str:
    if type(value) is str:
        return _plain_string(value)
    assert type(value) is list and value
    assert all(type(message) is dict for message in value)
    assert all(type(message.get("role")) in (str, type(None)) for message in value)
    return "\n".join(_plain_string(message["content"]) for message in value)


def _candidates(value: Any) -> tuple[str, ...]:
    if type(value) is list and value and type(value[0]) is not dict:
        return tuple(_plain(candidate) for candidate in value)
    return (_plain(value),)


def meaning_of_line(line: bytes, scoring: bool = False) -> Raw | None:
    def once(pairs: list[tuple[str, Any]]) -> Raw:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name twice")
        return dict(pairs)

    try:
        raw = json.loads(line.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None
    return meaning_of(raw, scoring)


def meaning(row: Row | BadRow) -> Raw:
    assert isinstance(row, Row), row
    return {name: value for name, value in asdict(row).items() if name not in ("file", "line")}


def without_nulls(meaning: Raw | None) -> Raw:
    """Tables have all their columns in every row, so an absent field comes back as null."""
    assert meaning is not None
    extra = {name: value for name, value in meaning["extra"].items() if value is not None}
    return meaning | {"extra": extra}


def as_lines(rows: list[Raw]) -> bytes:
    return b"".join(
        json.dumps(row, ensure_ascii=i % 2 == 0).encode() + b"\n" for i, row in enumerate(rows)
    )


def only_error(item: Row | BadRow) -> RowError:
    assert isinstance(item, BadRow), item
    assert len(item.errors) == 1, item.errors
    return item.errors[0]


# ---------------------------------------------------------------------------- sound rows


def test_importing_the_module_imports_no_heavy_library() -> None:
    heavy = ["torch", "transformers", "xtuner", "mmengine", "datasets", "pyarrow", "numpy"]
    code = f"import sys, polar_xtuner.records; print(*set({heavy}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_text_of_messages_is_their_contents_joined_by_newlines() -> None:
    messages = [{"role": "user", "content": "a"}, {"content": ""}, {"content": "b\n"}]
    assert text_of(messages) == "a\n\nb\n"
    assert text_of("as it is\n") == "as it is\n"


def test_a_row_means_the_same_as_strings_and_as_messages() -> None:
    strings: Raw = {"prompt": "p", "reference": "", "chosen": ["", "c"], "rejected": "r"}
    messages: Raw = {
        "prompt": [{"role": "user", "content": "p"}],
        "reference": [{"role": "assistant", "content": ""}],
        "chosen": [[{"content": ""}], [{"role": None, "content": "c"}]],
        "rejected": [{"role": "assistant", "content": "r"}],
    }
    row = parse_row(strings, "f", 1)
    assert row == parse_row(messages, "f", 1)
    assert row == Row("p", "", ("", "c"), ("r",), (), "sft", None, None, 0.0, "f", 1, extra={})


def test_optional_fields_are_kept_and_null_is_as_good_as_absent() -> None:
    base: Raw = {"prompt": "p", "reference": "", "chosen": "c", "rejected": "r"}
    given = base | {"wrapper": "pretrain", "source": "s", "id": 7, "margin": 2, "more": [None]}
    row = parse_row(given, "f", 3)
    assert isinstance(row, Row)
    assert (row.wrapper, row.source, row.id, row.margin) == ("pretrain", "s", "7", 2.0)
    assert row.extra == {"more": [None]}
    nulls = base | dict.fromkeys(["wrapper", "source", "id", "margin"])
    assert parse_row(nulls, "f", 1) == parse_row(base, "f", 1)


def test_a_row_to_score_has_outputs_or_two_sides() -> None:
    base: Raw = {"prompt": "p", "reference": "r"}
    sides: Raw = {"chosen": "c", "rejected": "d"}
    for output, texts in [
        ("a", ("a",)),
        (["a", "a"], ("a", "a")),
        ([{"role": "assistant", "content": "a"}], ("a",)),
        ([[{"content": "a"}], "b"], ("a", "b")),
    ]:
        row = parse_row(base | {"output": output}, "f", 1, scoring=True)
        assert isinstance(row, Row)
        assert (row.outputs, row.chosen, row.rejected, row.extra) == (texts, (), (), {})
    both = parse_row(base | sides | {"output": "a"}, "f", 1, scoring=True)
    assert isinstance(both, Row)
    assert (both.outputs, both.chosen, both.extra) == (("a",), (), sides)
    two_sides = base | sides | {"output": None}
    row = parse_row(two_sides, "f", 1, scoring=True)
    assert isinstance(row, Row)
    assert (row.outputs, row.chosen, row.rejected) == ((), ("c",), ("d",))
    assert only_error(parse_row(base, "f", 1, scoring=True)).field == "output"
    one_side = only_error(parse_row(base | {"chosen": "c"}, "f", 1, scoring=True))
    assert (one_side.field, one_side.problem) == ("rejected", "is missing")
    in_training = parse_row(two_sides | {"output": 3}, "f", 1)
    assert isinstance(in_training, Row) and in_training.extra == {"output": 3}


@pytest.mark.parametrize(
    ("name", "rows"),
    [("gsm8k", 1988), ("pandalm", 649), ("mt_bench", 274), ("arena_hard", 390)],
)
def test_all_rows_of_real_data_are_accepted(name: str, rows: int) -> None:
    file = DATA / f"{name}.jsonl"
    if not file.exists():
        pytest.skip(f"no {file}")
    check = RowCheck()
    assert sum(1 for _ in check.accept(read_rows([file]))) == rows
    assert (check.rows, check.bad) == (rows, 0)


# ---------------------------------------------------------------------------- files


def write_every_format(folder: Path, rows: list[Raw]) -> list[Path]:
    lines = as_lines(rows)
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    (folder / "d.json").write_bytes(BOM + b" \n" + lines)
    (folder / "e.parquet").write_bytes(parquet(rows))
    return sorted(folder.iterdir())


def parquet(rows: list[Raw], **options: Any) -> bytes:
    stream = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, **options), stream, row_group_size=100)
    return bytes(stream.getvalue())


def rows_of_one_shape(count: int) -> list[Raw]:
    """A column of a table has one type, so all rows write their candidates alike."""
    rng = random.Random(1)
    names = ["prompt", "reference"]
    return [
        {name: some_messages(rng) for name in names}
        | {"chosen": [some_messages(rng), some_messages(rng)]}
        | {"rejected": [f"{i}", some_text(rng)], "margin": i / 4, "id": i, "extra": {"n": [i]}}
        for i in range(count)
    ]


def test_every_format_gives_the_same_rows_in_order(tmp_path: Path) -> None:
    rows = rows_of_one_shape(700)
    expected = [without_nulls(meaning_of(row)) for row in rows]
    for path in write_every_format(tmp_path, rows):
        read = list(read_rows([path]))
        assert [without_nulls(meaning(row)) for row in read] == expected, path
        first = 2 if path.name == "d.json" else 1
        places = [(row.file, row.line) for row in read if isinstance(row, Row)]
        assert places == [(str(path), first + i) for i in range(700)]


def test_rows_of_every_shape_survive_lines_and_arrays(tmp_path: Path) -> None:
    rows = good_rows(500)
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_bytes(as_lines(rows))
    array.write_bytes(b"\n [" + b" ,\n ".join(as_lines(rows).splitlines()) + b"]\n\n")
    for path in (lines, array):
        assert [meaning(row) for row in read_rows([path])] == [meaning_of(row) for row in rows]


def test_parquet_columns_may_hold_strings_messages_or_lists_of_either(tmp_path: Path) -> None:
    a, b = "a 东京", "b"
    chosen, rejected = [{"role": "assistant", "content": a}], [{"role": None, "content": b}]
    for i, sides in enumerate([(a, b), ([a], [b]), (chosen, rejected), ([chosen], [rejected])]):
        path = tmp_path / f"{i}.parquet"
        row = {"prompt": "p", "reference": "r", "chosen": sides[0], "rejected": sides[1]}
        path.write_bytes(parquet([row]))
        (read,) = read_rows([path])
        assert isinstance(read, Row)
        assert (read.chosen, read.rejected) == ((a,), (b,))


def test_a_hugging_face_dataset_reads_like_a_file() -> None:
    datasets = pytest.importorskip("datasets")
    rows = rows_of_one_shape(50)
    read = list(map_rows(datasets.Dataset.from_list(rows), "mine"))
    assert [meaning(row) for row in read] == [meaning_of(row) for row in rows]
    places = [(row.file, row.line) for row in read if isinstance(row, Row)]
    assert places == [("mine", i) for i in range(1, 51)]


def test_files_are_found_by_name_list_glob_and_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    names = ["b.jsonl", "a.JSON", "sub/c.parquet", "sub/d.jsonl.gz"]
    for name in [*names, "readme.md", ".e.jsonl", ".hidden/f.jsonl"]:
        (tmp_path / name).touch()
    everything = [tmp_path / name for name in sorted(names)]
    b = tmp_path / "b.jsonl"
    assert find_files(tmp_path) == everything
    assert find_files(str(b)) == find_files(b) == find_files([b, str(b)]) == [b]
    assert find_files([b, tmp_path]) == [b, everything[0], *everything[2:]]
    assert find_files(f"{tmp_path}/*.json*") == [b]
    assert find_files(f"{tmp_path}/s*/*.*") == everything[2:]
    assert find_files(f"{tmp_path}/**/*.[pj]*") == [b, *everything[2:]]
    assert find_files(tmp_path / ".hidden") == [tmp_path / ".hidden" / "f.jsonl"]


def test_a_file_under_two_spellings_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    file = tmp_path / "a.jsonl"
    file.touch()
    (tmp_path / "link.jsonl").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    spellings = ["sub/../a.jsonl", "a.jsonl", "./a.jsonl", str(file), "link.jsonl", "*.jsonl"]
    for first in spellings[:-1]:
        assert find_files([first, *spellings]) == [Path(first)]


def test_a_file_name_may_look_like_a_glob(tmp_path: Path) -> None:
    odd = tmp_path / "a[1]*.jsonl"
    odd.touch()
    assert find_files(odd) == [odd]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("none.jsonl", FileNotFoundError, "no such file or folder"),
        ("*.parquet", FileNotFoundError, "matches no file"),
        ("empty", FileNotFoundError, "no file of a known format"),
        ("a.csv", ValueError, ".jsonl, .jsonl.gz, .json, .parquet"),
        ("*.csv", ValueError, "a.csv"),
    ],
)
def test_what_cannot_be_found_or_read_is_named(
    tmp_path: Path, name: str, error: type[Exception], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").touch()
    with pytest.raises(error) as raised:
        find_files([tmp_path / name])
    assert words in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_an_empty_list_of_files_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        find_files([])


GOOD = json.dumps({"prompt": "p", "reference": "r", "chosen": "c", "rejected": "d"}).encode()


def test_blank_lines_count_and_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    odd = GOOD.replace(b'"p"', '"p\u2028\x85q"'.encode())
    path.write_bytes(BOM + b"\n".join([b"", GOOD + b"\r", b" \t\r", odd, b"\r", GOOD]))
    rows = list(read_rows([path]))
    assert [(row.line, row.prompt) for row in rows if isinstance(row, Row)] == [
        (2, "p"),
        (4, "p\u2028\x85q"),
        (6, "p"),
    ]
    assert len(rows) == 3


def test_a_file_without_rows_gives_none(tmp_path: Path) -> None:
    contents = {"a.jsonl": b"\n", "b.jsonl.gz": gzip.compress(b""), "c.json": b" [ ]\n"}
    contents |= {"d.json": BOM, "e.parquet": parquet([], schema=pa.schema({"prompt": pa.string()}))}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert list(read_rows(find_files(tmp_path))) == []


def test_reading_streams(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    rows = read_rows([path, tmp_path / "missing.jsonl"])
    assert isinstance(next(rows), Row)
    with pytest.raises(FileNotFoundError):
        next(rows)


# ---------------------------------------------------------------------------- map functions


def test_what_a_map_function_returns_is_merged_over_the_row() -> None:
    examples = [{"question": "p", "reference": "old", "chosen": "c", "rejected": "d"}]
    (row,) = map_rows(examples, "n", lambda raw: {"prompt": raw["question"], "reference": "new"})
    assert isinstance(row, Row)
    assert (row.prompt, row.reference, row.chosen) == ("p", "new", ("c",))
    assert row.extra == {"question": "p"}


def test_a_map_function_that_fails_makes_its_row_bad_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, b'{"bad": 1}', b"[1]", GOOD]))

    def map_fn(raw: Raw) -> Raw:
        return {"prompt": raw["prompt"].upper()}

    items = list(read_rows([path], map_fn))
    assert [item.prompt for item in items if isinstance(item, Row)] == ["P", "P"]
    raised, no_object = only_error(items[1]), only_error(items[2])
    assert str(raised) == f"{path}:2: dataset_map_fn: raised KeyError: 'prompt'"
    assert (no_object.line, no_object.field) == (3, "row")
    (item,) = map_rows([json.loads(GOOD)], "n", lambda raw: [raw])  # type: ignore[arg-type, return-value]
    assert "must return a dict, found list" in only_error(item).problem


# ---------------------------------------------------------------------------- bad rows

MISSING = object()


def changed(**fields: Any) -> bytes:
    """The sound row with other values, or without a field that is MISSING."""
    row = json.loads(GOOD) | fields
    return json.dumps({name: value for name, value in row.items() if value is not MISSING}).encode()


def message(**fields: Any) -> list[Raw]:
    return [{"role": "user", "content": "x"}, fields]


BAD_LINES = [
    (b"{", "row", "is not JSON: Expecting property name"),
    (GOOD + b"x", "row", "is not JSON: Extra data (column 66)"),
    (GOOD.replace(b'"p"', b'"\x01"'), "row", "is not JSON: Invalid control character"),
    (BOM + GOOD, "row", "is not JSON"),
    (GOOD.replace(b'"p"', b'"\xff"'), "row", "is not UTF-8: invalid start byte (byte 13)"),
    (GOOD.replace(b'"p"', b'"\xed\xa0\x80"'), "row", "is not UTF-8"),
    (GOOD.decode().encode("utf-16"), "row", "is not UTF-8"),
    (b"[]", "row", "must be an object, found list []"),
    (b"null", "row", "must be an object, found null"),
    (b'"' + b"x" * 999 + b'"', "row", "must be an object, found str 'xxxxx"),
    (b"9" * 5000, "row", "holds an integer of 5000 digits"),
    (GOOD.replace(b'"p"', b"[" * 10**5 + b"]" * 10**5), "row", "is nested too deeply"),
    (GOOD.replace(b'"reference"', b'"prompt"'), "prompt", "stands 2 times in the same object"),
    (GOOD.replace(b'"p"', b'{"a": {"": 1, "": 2}}'), "''", "stands 2 times in the same object"),
    (changed(prompt=MISSING), "prompt", "is missing"),
    (changed(reference=None), "reference", "must be a string or a list of messages, found null"),
    (changed(chosen=3), "chosen", "must be a string or a list of messages, found int 3"),
    (changed(chosen=10**900), "chosen", "found int <2990 bits>"),
    (changed(rejected={"content": "x"}), "rejected", "found dict {'content': 'x'}"),
    (changed(rejected=True), "rejected", "found bool True"),
    (changed(prompt=""), "prompt", "must not be empty"),
    (changed(prompt=message()[:0]), "prompt", "must not be an empty list"),
    (changed(prompt=[{"content": ""}]), "prompt", "must not be empty"),
    (changed(prompt=["p"]), "prompt[0]", "must be a message with role and content, found str 'p'"),
    (changed(prompt=message()), "prompt[1].content", "is missing"),
    (changed(reference=message(content=None)), "reference[1].content", "a string, found null"),
    (changed(chosen=message(content=[1])), "chosen[1].content", "a string, found list [1]"),
    (changed(chosen=message(role=3, content="")), "chosen[1].role", "a string, found int 3"),
    (changed(chosen=[]), "chosen", "must not be an empty list"),
    (changed(chosen=["a", []]), "chosen[1]", "must not be an empty list"),
    (changed(chosen=["a", 1.5]), "chosen[1]", "found float 1.5"),
    (changed(chosen=["a", {"content": "b"}]), "chosen[1]", "found dict {'content': 'b'}"),
    (changed(chosen=["a", message()]), "chosen[1][1].content", "is missing"),
    (changed(rejected="c"), "chosen", "must differ from rejected, is the same text"),
    (changed(rejected=["x", [{"content": "c"}]]), "chosen", "must differ from rejected[1]"),
    (changed(chosen=["x", "d"]), "chosen[1]", "must differ from rejected, is"),
    (changed(wrapper="SFT"), "wrapper", "must be one of sft, pretrain, found str 'SFT'"),
    (changed(wrapper=["sft"]), "wrapper", "must be one of sft, pretrain, found list ['sft']"),
    (changed(source=1), "source", "must be a string, found int 1"),
    (changed(id=1.0), "id", "must be a string or an integer, found float 1.0"),
    (changed(id=False), "id", "must be a string or an integer, found bool False"),
    (changed(margin="1"), "margin", "must be a finite number, found str '1'"),
    (changed(margin=True), "margin", "must be a finite number, found bool True"),
    (changed(margin=math.nan), "margin", "must be a finite number, found float nan"),
    (changed(margin=-math.inf), "margin", "must be a finite number, found float -inf"),
    (changed(margin=10**400), "margin", "must be a finite number, found int <1329 bits>"),
    (changed(prompt="ab\ud800"), "prompt", r"found the lone surrogate '\ud800' at character 2"),
    (changed(chosen=[{"content": "\udfff"}]), "chosen[0].content", "must be valid Unicode"),
    (changed(id="\ud800"), "id", "must be valid Unicode"),
]


every_bad_line = pytest.mark.parametrize(
    ("line", "field", "words"), BAD_LINES, ids=[f"{field} {words}" for _, field, words in BAD_LINES]
)


@every_bad_line
def test_a_bad_line_is_named_by_file_line_and_field_and_spoils_no_other(
    tmp_path: Path, line: bytes, field: str, words: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, line, GOOD]))
    before, bad, after = read_rows([path])
    error = only_error(bad)
    assert (error.file, error.line, error.field) == (str(path), 2, field)
    assert words in error.problem
    assert len(str(error)) < len(str(path)) + 200
    assert isinstance(before, Row) and isinstance(after, Row)


@every_bad_line
def test_a_bad_row_of_an_array_spoils_no_other_unless_its_end_cannot_be_told(
    tmp_path: Path, line: bytes, field: str, words: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b",\n".join([GOOD, line, GOOD]) + b"]")
    items = list(read_rows([path]))
    error = only_error(next(item for item in items if isinstance(item, BadRow)))
    assert (error.file, error.line) == (str(path), 2)
    assert len(str(error)) < len(str(path)) + 200
    if error.field == "file":
        assert "not JSON" in words or "nested" in words or b"\0" in line
        assert items[-1] == BadRow((error,))
    else:
        assert error.field == field
        assert [type(item) for item in items] == [Row, BadRow, Row]


def test_all_that_is_wrong_with_a_row_is_said_at_once() -> None:
    raw = {"prompt": [{"role": 1}, "x"], "chosen": "c", "rejected": ["c"], "margin": math.nan}
    item = parse_row(raw | {"wrapper": "x"}, "f", 9)
    assert isinstance(item, BadRow)
    assert [(error.line, error.field) for error in item.errors] == [
        (9, "prompt[0].role"),
        (9, "prompt[0].content"),
        (9, "prompt[1]"),
        (9, "reference"),
        (9, "chosen"),
        (9, "wrapper"),
        (9, "margin"),
    ]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.just(5000).map(lambda n: 10**n)
    | st.binary()
    | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries({"content": inner}, optional={"role": inner})
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=8,
)
fields = [
    "prompt",
    "reference",
    "chosen",
    "rejected",
    "output",
    "wrapper",
    "source",
    "id",
    "margin",
]


@settings(max_examples=300, deadline=None)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(fields, values)), st.booleans())
def test_any_python_value_is_a_row_or_a_bad_row(raw: Raw, scoring: bool) -> None:
    item = parse_row(raw, "f", 1, scoring=scoring)
    if isinstance(item, BadRow):
        for error in item.errors:
            assert error.field
            assert "\n" not in str(error) and len(str(error)) < 200
    else:
        assert meaning(item) == meaning_of(raw, scoring)


# Mutations: of the bytes of a line, or of the structure of its row.


def mutated_bytes(rng: random.Random, row: Raw) -> bytes:
    line = bytearray(json.dumps(row, ensure_ascii=rng.random() < 0.3).encode())
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(line)) if line else 0
        match rng.choice(["flip", "flip", "set", "insert", "insert", "delete", "cut", "repeat"]):
            case "flip" if line:
                line[at] ^= 1 << rng.randrange(8)
            case "set" if line:
                line[at] = rng.randrange(256)
            case "insert":
                line[at:at] = rng.choice(
                    [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\0", b"x"]
                )
            case "delete":
                del line[at : at + rng.randint(1, 4)]
            case "cut" if rng.random() < 0.3:
                del line[at:]
            case "repeat":
                line[at:at] = line[at : at + rng.randint(1, 30)]
    return bytes(line)


ODD_VALUES = [
    None,
    True,
    False,
    0,
    -1,
    10**25,
    10**400,
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    "",
    " ",
    "sft",
    "�",
    "x��",
    "��",
    "\x00",
    "pretrain",
    "SFT",
    [],
    [[]],
    {},
    [{}],
    ["a", "b"],
    [["a"]],
    [1],
    {"content": "x"},
    [{"content": "x"}],
    [[{"content": "x"}], "y"],
    [{"role": None, "content": "x"}],
    [{"role": 1, "content": "x"}],
    [{"content": None}],
]


def mutated_structure(rng: random.Random, row: Raw) -> bytes:
    row = json.loads(json.dumps(row))
    name = rng.choice([*row, "wrapper", "source", "id", "margin"])
    lists = [value for value in row.values() if isinstance(value, list) and value]
    objects = [item for items in lists for item in items if isinstance(item, dict)]
    match rng.randrange(10):
        case 0:
            row.pop(name, None)
        case 1:
            row[name + rng.choice(["", "s", "\ud800"])] = row.pop(name, None)
        case 2 | 3:
            row[name] = rng.choice(ODD_VALUES)
        case 4:
            row[name] = rng.choice([[row.get(name)], {"content": row.get(name)}, [[row.get(name)]]])
        case 5 if objects:
            rng.choice(objects)[rng.choice(["role", "content", "name"])] = rng.choice(ODD_VALUES)
        case 6 if lists:
            rng.choice(lists).insert(0, rng.choice(ODD_VALUES))
        case 7:
            row["rejected"] = rng.choice([row["chosen"], [row["chosen"]], [row["chosen"], "z"]])
        case 8:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    line = json.dumps(row, ensure_ascii=True)
    if rng.random() < 0.15:
        depth = rng.choice([50, 50_000])
        extra = [
            f'"{name}": 1',
            '"huge": ' + "9" * rng.choice([4000, 4301]),
            f'"{rng.choice([name, "deep"])}": ' + "[" * depth + "]" * depth,
            '"odd": {"a": 1, "a": 1}',
            '"inf": 1e999, "nan": NaN',
        ]
        line = line[:-1] + (", " if row else "") + rng.choice(extra) + "}"
    return line.encode()


@pytest.mark.parametrize("scoring", [False, True])
def test_a_mutated_row_keeps_its_meaning_or_is_named(tmp_path: Path, scoring: bool) -> None:
    rng = random.Random(scoring)
    rows = good_rows(300, seed=2)
    lines = [GOOD]  # so that no mutated line comes to stand first, where a BOM may
    while len(lines) < 8_000:
        mutate = rng.choice([mutated_bytes, mutated_structure])
        lines += mutate(rng, rng.choice(rows)).splitlines() or [b""]
    path = tmp_path / "mutated.jsonl"
    path.write_bytes(b"\n".join(lines))
    items = read_rows([path], scoring=scoring)
    accepted = named = 0
    for number, line in enumerate(lines, 1):
        if not line.strip(b" \t\r\n"):
            continue
        item = next(items)
        expected = meaning_of_line(line, scoring)
        if isinstance(item, Row):
            accepted += 1
            assert (item.file, item.line) == (str(path), number)
            assert repr(meaning(item)) == repr(expected), line  # repr, since NaN is not NaN
        else:
            named += 1
            assert expected is None, (line, item)
            for error in item.errors:
                assert (error.file, error.line) == (str(path), number)
                assert error.field and error.problem
                assert len(str(error)) < len(str(path)) + 200 and "\n" not in str(error)
    assert next(items, None) is None
    print(f"{accepted} accepted, {named} named")
    assert accepted > 1000 and named > 1000


# ---------------------------------------------------------------------------- broken files


def truncations(data: bytes) -> Iterator[bytes]:
    rng = random.Random(4)
    yield from (data[: rng.randrange(1, len(data))] for _ in range(40))
    yield from (data[:-1], data[:1])


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.json", "e.parquet"])
def test_a_truncated_file_is_named_and_reading_goes_on_with_the_next(
    tmp_path: Path, name: str
) -> None:
    rows = rows_of_one_shape(300)
    expected = [without_nulls(meaning_of(row)) for row in rows]
    write_every_format(tmp_path, rows)
    path, next_file = tmp_path / name, tmp_path / "next.jsonl"
    next_file.write_bytes(GOOD)
    for data in truncations(path.read_bytes()):
        path.write_bytes(data)
        *items, last, after = read_rows([path, next_file])
        assert [without_nulls(meaning(item)) for item in items] == expected[: len(items)]
        error = only_error(last)
        assert (error.file, error.field) == (str(path), "file")
        at = data.count(b"\n") + 1 if name == "c.json" else len(items) + 1
        assert error.line <= at if name == "c.json" else error.line == at
        assert len(error.problem) < 200
        assert isinstance(after, Row) and after.file == str(next_file)


def test_what_is_no_gzip_or_parquet_is_named_as_such(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.parquet"):
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "c.parquet").write_bytes(b"")
    errors = [only_error(item) for item in read_rows(find_files(tmp_path))]
    assert [(Path(error.file).name, error.line, error.field) for error in errors] == [
        ("a.jsonl.gz", 1, "file"),
        ("b.parquet", 1, "file"),
        ("c.parquet", 1, "file"),
    ]


def test_a_changed_byte_in_a_gzip_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    data = bytearray(gzip.compress(as_lines(good_rows(20))))
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert isinstance(list(read_rows([path]))[-1], BadRow)


@pytest.mark.parametrize(
    ("text", "rows", "line"),
    [
        ("[\n%s,\n%s\n%s]", 2, 4),
        ("[\n%s,\n]", 1, 3),
        ("[%s,\n\n%s}", 2, 3),
        ("[%s]\n[%s]", 1, 2),
        ("\n[%s,\n %s,\n nul]", 2, 4),
    ],
)
def test_a_broken_json_array_is_named_with_the_line_of_its_first_error(
    tmp_path: Path, text: str, rows: int, line: int
) -> None:
    path = tmp_path / "a.json"
    path.write_text(text.replace("%s", GOOD.decode()))
    *items, last = read_rows([path])
    assert [isinstance(item, Row) for item in items] == [True] * rows
    error = only_error(last)
    assert (error.line, error.field) == (line, "file")


def test_parquet_values_that_python_cannot_hold_are_named_by_row_and_column(
    tmp_path: Path,
) -> None:
    table = pa.Table.from_pylist([json.loads(GOOD)] * 2)
    day = pa.array([1, 2**30], pa.int32()).cast(pa.date32())
    not_utf8 = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"p\xff")]
    )
    table = table.set_column(0, "prompt", not_utf8).append_column("day", day)
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    row, bad = read_rows([path])
    assert isinstance(row, Row) and isinstance(bad, BadRow)
    assert [(error.line, error.field) for error in bad.errors] == [(2, "prompt"), (2, "day")]


def test_bytes_in_parquet_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet([json.loads(GOOD) | {"prompt": b"p"}]))
    (item,) = read_rows([path])
    assert only_error(item).problem.endswith("found bytes b'p'")


def test_parquet_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["prompt"] * 2), path)
    (item,) = read_rows([path])
    assert only_error(item).field == "file"


# ---------------------------------------------------------------------------- reports


def mixed(good: int, bad: int) -> Iterator[Row | BadRow]:
    for i in range(good + bad):
        yield parse_row(json.loads(GOOD) if i < good else {"prompt": "x" * 10**5}, "f", i + 1)


def test_good_rows_come_first_and_then_all_bad_ones_are_reported_together() -> None:
    check = RowCheck()
    rows = check.accept(mixed(5, 30))
    assert [next(rows).line for _ in range(5)] == [1, 2, 3, 4, 5]
    with pytest.raises(BadRowsError) as raised:
        next(rows)
    error = raised.value
    assert (check.rows, check.bad, check.errors) == (35, 30, error.errors)
    assert (error.count, len(error.errors)) == (30, 20)
    first, *listed, more, advice = str(error).splitlines()
    assert first == "30 of 35 rows are bad:"
    assert [line.strip() for line in listed] == [str(e) for e in error.errors]
    assert listed[0].strip() == "f:6: reference: is missing"
    assert more.strip() == "... and 70 more"  # 30 rows, 3 errors each
    assert 'on_bad_row="skip"' in advice
    assert max(map(len, str(error).splitlines())) < 200


def test_the_report_survives_a_process_boundary() -> None:
    with pytest.raises(BadRowsError) as raised:
        list(RowCheck().accept(mixed(1, 1)))
    copy = pickle.loads(pickle.dumps(raised.value))
    assert str(copy) == str(raised.value)
    assert (copy.errors, copy.count) == (raised.value.errors, 1)


def test_skipping_counts_the_bad_rows_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    check = RowCheck("skip")
    assert len(list(check.accept(mixed(5, 30)))) == 5
    assert (check.rows, check.bad, len(check.errors)) == (35, 30, 20)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "30 of 35 rows are bad" in record.getMessage()


def test_sound_rows_pass_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    for mode in ("error", "skip"):
        check = RowCheck(mode)
        assert len(list(check.accept(mixed(3, 0)))) == check.rows == 3
    assert caplog.records == []


def test_what_was_made_of_rows_is_counted_and_passed_on_like_rows() -> None:
    check = RowCheck("skip")
    made = (item if isinstance(item, BadRow) else (item.line, "ids") for item in mixed(2, 1))
    assert list(check.accept(made)) == [(1, "ids"), (2, "ids")]
    assert (check.rows, check.bad) == (3, 1)


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="ignore"):
        RowCheck("ignore")
