import importlib
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset as HFDataset
from datasets import DatasetDict, load_dataset
from mmengine.config import ConfigDict
from mmengine.registry import DATASETS
from torch.utils.data import DataLoader
from xtuner.registry import BUILDER, MAP_FUNC

from polar_xtuner import tokenise, workers
from polar_xtuner.cache import ARRAYS, Group, attended_by
from polar_xtuner.collate import PackLayout, collate_pack
from polar_xtuner.dataset import PolarDataset
from polar_xtuner.packing import Pack, Share, plan_epoch
from polar_xtuner.records import BadRowsError
from polar_xtuner.template import Candidate, PolarTemplate

Raw = dict[str, Any]


def row(number: int = 0, **fields: Any) -> Raw:
    return {
        "prompt": f"What is {number} plus 1?",
        "reference": f"{number + 1}",
        "chosen": f"It is {number + 1}.",
        "rejected": f"It is {number}.",
        **fields,
    }


BAD_ROW = row(rejected=3)


ROWS = [row(number) for number in range(5)]


def write(path: Path, rows: list[Raw]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def build(tmp_path: Path, demo_tokenizer: Any) -> Callable[..., PolarDataset]:
    """A dataset of rows (or of `data_files=`, `dataset=`) with its cache under `tmp_path`."""

    def build_dataset(rows: list[Raw] | None = None, **options: Any) -> PolarDataset:
        if rows is not None:
            options["data_files"] = str(write(tmp_path / "train.jsonl", rows))
        options = {
            "tokenizer": demo_tokenizer,
            "max_length": 400,
            "max_response_length": 100,
            "cache_dir": str(tmp_path / "cache"),
            **options,
        }
        return PolarDataset(**options)

    return build_dataset


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many candidates each call of `PolarTemplate.encode` was given."""
    calls: list[int] = []
    encode = PolarTemplate.encode

    def counting(self: PolarTemplate, candidates: Any) -> Any:
        calls.append(len(candidates))
        return encode(self, candidates)

    monkeypatch.setattr(PolarTemplate, "encode", counting)
    yield calls


def stores_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.exists() else []


def sequences_of(dataset: PolarDataset, number: int) -> list[list[int]]:
    return spelled(dataset.store[number])


def spelled(group: Group) -> list[list[int]]:
    tokens, (prefix, *suffixes), _ = group
    ends = prefix + np.cumsum(suffixes)
    return [
        [*tokens[:prefix].tolist(), *tokens[end - n : end].tolist()]
        for end, n in zip(ends, suffixes)
    ]


def pairs_of(dataset: PolarDataset, number: int) -> list[tuple[list[int], list[int], float]]:
    sequences = sequences_of(dataset, number)
    return [
        (sequences[c], sequences[r], margin)
        for c, r, margin, *_ in dataset.store[number].pairs.tolist()
    ]


def pack_of(dataset: PolarDataset, numbers: Iterable[int], pair_weight: float = 1.0) -> Pack:
    return Pack(tuple(Share(n, 0, int(dataset.pair_counts[n])) for n in numbers), pair_weight)


def row_of(dataset: PolarDataset, number: int) -> tuple[int, int]:
    """Number of the file and line of the one row of a group."""
    ((file, line),) = {*dataset.store[number].pairs[["file", "line"]].tolist()}
    return file, line


# Rows become groups.


def some_rows(count: int, seed: int = 0) -> list[Raw]:
    rng = random.Random(seed)

    def texts(side: str) -> Any:
        made = [
            f"{side} {' '.join(rng.choices(['12', 'é', 'Ada', '<s>', ''], k=rng.randint(0, 9)))}"
            for _ in range(rng.randint(1, 4))
        ]
        return made[0] if len(made) == 1 and rng.random() < 0.5 else made

    return [
        row(
            number,
            chosen=texts("yes"),
            rejected=texts("no"),
            reference=rng.choice(["", "31", "yes 12"]),
            wrapper=rng.choice(["sft", "pretrain"]),
            margin=rng.uniform(-1, 1),
        )
        for number in range(count)
    ]


def test_every_chosen_and_rejected_candidate_of_a_row_make_a_pair(
    build: Callable[..., PolarDataset], demo_tokenizer: Any
) -> None:
    rows = some_rows(200)
    dataset = build(rows)
    template = PolarTemplate(demo_tokenizer, 400, 100)
    assert len(dataset.store) == 200
    for number, raw in enumerate(rows):

        def encode(text: str, raw: Raw = raw) -> list[int]:
            return template.encode(
                [Candidate(raw["prompt"], raw["reference"], text, raw["wrapper"])]
            )[0]

        chosen, rejected = (
            [value] if isinstance(value := raw[side], str) else value
            for side in ("chosen", "rejected")
        )
        wanted = [(encode(c), encode(r), raw["margin"]) for c, r in product(chosen, rejected)]
        assert pairs_of(dataset, number) == wanted
        distinct = {*map(tuple, (encode(text) for text in [*chosen, *rejected]))}
        assert len(sequences_of(dataset, number)) == len(distinct)
    assert dataset.pair_counts.tolist() == [len(pairs_of(dataset, n)) for n in range(200)]
    assert dataset.lengths.tolist() == [len(dataset.store[n].tokens) for n in range(200)]


def merged_rows(seed: int = 0) -> list[Raw]:
    """Rows of three prompts and two references, in which candidates come again and again."""
    rng = random.Random(seed)
    answers = ["", "41", "42", "forty two", "I don't know"]
    rows = []
    for number in range(120):
        better, worse = rng.sample(answers, 2)
        rows.append(
            row(
                number % 3,
                reference=rng.choice(["31", "42"]),
                wrapper=rng.choice(["sft", "pretrain"]),
                chosen=[better] if rng.random() < 0.3 else better,
                rejected=worse,
                margin=rng.random(),
            )
        )
    return rows


def all_pairs(dataset: PolarDataset) -> list[Any]:
    """(chosen, rejected, margin, file, line) of all groups that are trained on, sorted."""
    pairs = []
    for number in range(len(dataset.lengths)):
        group = dataset.group(number)
        assert len(group.tokens) == dataset.lengths[number]
        assert len(group.pairs) == dataset.pair_counts[number]
        candidates = spelled(group)
        assert len({*map(tuple, candidates)}) == len(candidates), "a candidate is laid out twice"
        pairs += [(candidates[c], candidates[r], *rest) for c, r, *rest in group.pairs.tolist()]
    return sorted(pairs)


def test_rows_of_one_prompt_reference_and_wrapper_make_one_group(
    build: Callable[..., PolarDataset],
) -> None:
    rows = merged_rows()
    merged, apart = build(rows), build(rows, group_candidates=False)
    assert len(merged.lengths) == len({(r["prompt"], r["reference"], r["wrapper"]) for r in rows})
    assert apart.pair_counts.tolist() == [1] * 120
    assert all_pairs(merged) == all_pairs(apart)
    assert len(all_pairs(merged)) == 120
    assert merged.lengths.sum() < apart.lengths.sum() / 5
    whole = sum(len(c) + len(r) for c, r, *_ in all_pairs(apart))
    for dataset in (merged, apart):
        assert dataset.store.unshared_lengths().sum() == whole
        assert dataset.store.meta["rows"] == 120


def test_groups_come_in_the_order_of_their_first_rows(build: Callable[..., PolarDataset]) -> None:
    dataset = build([row(2), row(1), row(2, chosen="7"), row(3), row(1, chosen="7")])
    lines = [dataset.group(n).pairs["line"].tolist() for n in range(3)]
    assert lines == [[1, 3], [2, 5], [4]]


def test_pairs_do_not_depend_on_the_number_of_processes_or_the_size_of_chunks(
    build: Callable[..., PolarDataset], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = some_rows(150) + merged_rows()
    plain = build(rows, num_proc=1)
    for characters, processes in ((1, 3), (700, 2), (5000, 1)):
        monkeypatch.setattr(tokenise, "CHUNK_CHARACTERS", characters)
        cache = str(tmp_path / f"cache{processes}")
        other = build(rows, num_proc=processes, cache_dir=cache)
        for name in ARRAYS:
            ours, theirs = (next(Path(c).glob(f"*/{name}")) for c in (cache, tmp_path / "cache"))
            assert ours.read_bytes() == theirs.read_bytes(), name
        assert all_pairs(other) == all_pairs(plain)
        assert not [*Path(cache).glob("**/*.spool")]


def test_rows_are_named_however_they_were_merged(
    build: Callable[..., PolarDataset], tmp_path: Path
) -> None:
    files = [write(tmp_path / "a.jsonl", ROWS[:2]), write(tmp_path / "b.jsonl", [ROWS[1], ROWS[0]])]
    dataset = build(data_files=files)
    assert dataset[pack_of(dataset, (0, 1))]["rows"] == [
        f"{files[0]}:1", f"{files[1]}:2", f"{files[0]}:2", f"{files[1]}:1"
    ]  # fmt: skip


def test_texts_may_be_strings_of_another_kind(build: Callable[..., PolarDataset]) -> None:
    strange = [{k: np.str_(v) for k, v in raw.items()} for raw in ROWS]
    mapped = build(ROWS, dataset_map_fn=partial(_look_up, dict(enumerate(strange))))
    assert all_sequences(mapped) == all_sequences(build(ROWS))


def _look_up(rows: dict[int, Raw], raw: Raw) -> Raw:
    return next(r for r in rows.values() if r["prompt"] == raw["prompt"])


def test_a_killed_process_is_an_error_that_names_the_setting(
    build: Callable[..., PolarDataset], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(*arguments: Any) -> Iterator[Any]:
        raise workers.WorkerError("a process ended with status -9")
        yield

    monkeypatch.setattr(tokenise, "CHUNK_CHARACTERS", 100)
    monkeypatch.setattr(tokenise, "run_in_order", killed)
    with pytest.raises(workers.WorkerError, match=r"status -9.*num_proc"):
        build(ROWS, num_proc=2)
    assert not stores_in(tmp_path / "cache")


def test_margins_are_those_of_the_rows_and_0_by_default(
    build: Callable[..., PolarDataset],
) -> None:
    dataset = build([row(0, margin=0.1), row(1), row(2, margin=-3)])
    assert [dataset.store[n].pairs["margin"].tolist() for n in range(3)] == [[0.1], [0], [-3]]


def test_a_text_given_twice_is_laid_out_once_and_its_pairs_count_twice(
    build: Callable[..., PolarDataset],
) -> None:
    dataset = build([row(chosen=["42", "42", "41"], rejected=["7", "7"])])
    assert len(sequences_of(dataset, 0)) == 3
    assert dataset.store[0].pairs[["chosen", "rejected"]].tolist() == [
        *[(0, 1)] * 2,
        *[(0, 1)] * 2,
        *[(2, 1)] * 2,
    ]


def test_texts_that_are_equal_once_they_are_cut_are_laid_out_once(
    build: Callable[..., PolarDataset],
) -> None:
    dataset = build([row(chosen=["1" * 200, "1" * 300], rejected="2")])
    assert len(sequences_of(dataset, 0)) == 2
    assert dataset.pair_counts.tolist() == [2]


def test_chosen_and_rejected_that_are_equal_once_cut_are_named(
    build: Callable[..., PolarDataset], tmp_path: Path
) -> None:
    rows = [row(0), row(1, chosen="1" * 200, rejected=["2", "1" * 300]), row(2)]
    with pytest.raises(BadRowsError) as error:
        build(rows)
    (problem,) = error.value.errors
    assert (problem.file, problem.line) == (str(tmp_path / "train.jsonl"), 2)
    assert problem.field == "chosen" and "cut" in problem.problem
    assert not stores_in(tmp_path / "cache")


def test_chosen_and_rejected_that_are_equal_once_cut_can_be_skipped(
    build: Callable[..., PolarDataset],
) -> None:
    rows = [row(0), row(1, chosen="1" * 200, rejected="1" * 300), BAD_ROW, row(2)]
    dataset = build(rows, on_bad_row="skip")
    assert dataset.store.meta["rows"] == len(dataset.store) == 2
    assert dataset.store.meta["bad_rows"] == 2
    assert [row_of(dataset, n) for n in range(2)] == [(0, 1), (0, 4)]


# Bad rows.


def test_bad_rows_stop_before_anything_is_tokenised(
    build: Callable[..., PolarDataset], encoded: list[int], tmp_path: Path
) -> None:
    with pytest.raises(BadRowsError) as error:
        build([row(0), BAD_ROW, row(2), row(3, prompt=""), row(4)])
    assert [(e.line, e.field) for e in error.value.errors] == [(2, "rejected"), (4, "prompt")]
    assert error.value.rows == 5
    assert encoded == []
    assert not stores_in(tmp_path / "cache")


def test_skipped_rows_are_counted_and_the_others_keep_their_lines(
    build: Callable[..., PolarDataset],
) -> None:
    dataset = build([BAD_ROW, row(1), BAD_ROW, row(3)], on_bad_row="skip")
    assert dataset.store.meta["bad_rows"] == 2
    assert [row_of(dataset, n)[1] for n in range(len(dataset.store))] == [2, 4]


@pytest.mark.parametrize("rows", [[], [BAD_ROW, BAD_ROW]])
def test_no_row_left_is_an_error_that_names_the_file(
    build: Callable[..., PolarDataset], rows: list[Raw], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="there is no row in") as error:
        build(rows, on_bad_row="skip")
    assert str(tmp_path / "train.jsonl") in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"on_bad_row": "ignore"},
        {"on_long_group": "ignore"},
        {"num_proc": 0},
        {"num_proc": "2"},
        {"dataset": []},
        {"data_files": None},
        {"dataset_map_fn": "nowhere.to_be_found"},
        {"dataset_map_fn": "os.path"},
    ],
)
def test_a_setting_without_meaning_stops_before_any_file_is_read(
    build: Callable[..., PolarDataset], options: Raw, tmp_path: Path
) -> None:
    (name,) = options
    with pytest.raises(ValueError) as error:
        build(**{"data_files": str(tmp_path / "missing.jsonl"), **options})
    assert name in str(error.value)


# Groups and pairs that are longer than a pack.


LONG = [row(0), row(1, chosen="7" * 150), row(2), row(3, rejected="8" * 150)]


def test_pairs_that_do_not_fit_a_pack_are_named_with_their_lengths(
    build: Callable[..., PolarDataset], tmp_path: Path
) -> None:
    wide = build(LONG)
    long = [wide.lengths[1], wide.lengths[3]]
    assert min(long) > 100 > max(wide.lengths[[0, 2]])
    with pytest.raises(ValueError) as error:
        build(LONG, max_packed_length=100)
    for line, length in zip((2, 4), long):
        assert f"{tmp_path / 'train.jsonl'}:{line}: {length} tokens" in str(error.value)
    assert "2 pairs do not fit" in str(error.value) and "on_long_group" in str(error.value)


def test_pairs_that_do_not_fit_a_pack_can_be_left_out(
    build: Callable[..., PolarDataset], tmp_path: Path
) -> None:
    wide = build(LONG)
    dataset = build(LONG, max_packed_length=100, on_long_group="skip")
    assert dataset.lengths.tolist() == wide.lengths[[0, 2]].tolist()
    assert dataset.pair_counts.tolist() == [1, 1]
    path = tmp_path / "train.jsonl"
    assert dataset[pack_of(dataset, (0, 1))]["rows"] == [f"{path}:1", f"{path}:3"]
    assert {place for pack in dataset for place in pack["rows"]} == {f"{path}:1", f"{path}:3"}


@pytest.mark.parametrize("cap", [36, 40, 50])
def test_a_group_larger_than_a_pack_is_split_and_keeps_every_pair(
    build: Callable[..., PolarDataset], cap: int
) -> None:
    rows = merged_rows()
    rows += [row(9, chosen=[*"abcdefgh"], rejected=[*"ijklmnopq"], margin=0.5)]
    whole, split = build(rows), build(rows, max_packed_length=cap)
    assert max(whole.lengths) > cap
    assert max(split.lengths) <= cap
    assert all_pairs(split) == all_pairs(whole)
    places = [place for pack in split for place in pack["rows"]]
    assert len({*places}) == 121
    one_by_one = [
        attended_by(split.group(n).pieces, np.array([0])) for n in range(len(split.lengths))
    ]
    assert split.attended.tolist() == [int(n[0]) for n in one_by_one]


def test_a_group_of_exactly_a_pack_fits(build: Callable[..., PolarDataset]) -> None:
    longest = int(build(LONG).lengths.max())
    assert len(build(LONG, max_packed_length=longest).lengths) == 4
    with pytest.raises(ValueError, match="do not fit"):
        build(LONG, max_packed_length=longest - 1)


def test_no_group_that_fits_is_an_error(build: Callable[..., PolarDataset]) -> None:
    with pytest.raises(ValueError, match="there is no row in"):
        build(LONG, max_packed_length=5, on_long_group="skip")


# What changes the key of the store, and what does not.


def tokenises(build: Callable[..., PolarDataset], encoded: list[int], **options: Any) -> bool:
    before = len(encoded)
    build(**options)
    return len(encoded) > before


def test_a_second_start_tokenises_nothing(
    build: Callable[..., PolarDataset], encoded: list[int]
) -> None:
    assert tokenises(build, encoded, rows=ROWS)
    assert not tokenises(build, encoded, rows=ROWS)


def test_the_name_place_and_time_of_a_file_are_nothing_to_the_key(
    build: Callable[..., PolarDataset], encoded: list[int], tmp_path: Path
) -> None:
    build(ROWS)
    (tmp_path / "other").mkdir()
    moved = write(tmp_path / "other" / "renamed.jsonl", ROWS)
    os.utime(moved, (1, 1))
    dataset = build(data_files=[moved])
    assert len(encoded) == 1
    assert dataset[0]["rows"][0].startswith(f"{moved}:"), "rows are named as they are now"


def test_the_content_of_any_file_changes_the_key(
    build: Callable[..., PolarDataset], encoded: list[int], tmp_path: Path
) -> None:
    a, b = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:3])
    time = a.stat().st_mtime
    for options in (
        {"data_files": [a, b]},
        {"data_files": [b, a]},
        {"data_files": [a]},
        {"data_files": [write(tmp_path / "ab.jsonl", ROWS + ROWS[:3])]},
    ):
        assert tokenises(build, encoded, **options)
    write(b, [row(7), *ROWS[1:3]])
    os.utime(b, (time, time))
    assert tokenises(build, encoded, data_files=[a, b])


def test_files_are_told_apart_even_where_their_joint_content_is_the_same(
    build: Callable[..., PolarDataset], encoded: list[int], tmp_path: Path
) -> None:
    for split in (1, 2, 4):
        files = [
            write(tmp_path / "a.jsonl", ROWS[:split]),
            write(tmp_path / "b.jsonl", ROWS[split:]),
        ]
        assert tokenises(build, encoded, data_files=files)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 399},
        {"max_response_length": 99},
        {"separator_token_id": 1000},
        {"reward_token_id": 1000},
        {"on_bad_row": "skip"},
        {"dataset_map_fn": dict},
        {"group_candidates": False},
    ],
)
def test_a_setting_that_changes_ids_or_rows_changes_the_key(
    build: Callable[..., PolarDataset], encoded: list[int], options: Raw
) -> None:
    build(ROWS)
    assert tokenises(build, encoded, rows=ROWS, **options)


def test_another_tokenizer_changes_the_key(
    build: Callable[..., PolarDataset], encoded: list[int], demo: Any
) -> None:
    build(ROWS)
    assert not tokenises(build, encoded, rows=ROWS, tokenizer=demo.build_tokenizer())
    other = demo.build_tokenizer()
    other.add_tokens(["What is"])
    assert tokenises(build, encoded, rows=ROWS, tokenizer=other)


@pytest.mark.parametrize(
    "options", [{"max_packed_length": 300}, {"on_long_group": "skip"}, {"num_proc": 3}]
)
def test_packing_does_not_change_the_key(
    build: Callable[..., PolarDataset], encoded: list[int], options: Raw
) -> None:
    build(ROWS)
    assert not tokenises(build, encoded, rows=ROWS, **options)


MAPPING = """
PREFIX = {prefix!r}

def suffix():
    return {suffix!r}

def from_question(row, more=""):
    return {{"prompt": PREFIX + row["question"] + suffix() + more}}
"""


@pytest.fixture
def mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A module of that source, imported as a fresh process would."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(prefix: str = "", suffix: str = "") -> Any:
        source = MAPPING.format(prefix=prefix, suffix=suffix)
        (tmp_path / "polar_test_mapping.py").write_text(source)
        sys.modules.pop("polar_test_mapping", None)
        importlib.invalidate_caches()
        return importlib.import_module("polar_test_mapping")

    yield load
    sys.modules.pop("polar_test_mapping", None)


QUESTIONS = [{**{k: v for k, v in r.items() if k != "prompt"}, "question": "6 x 7?"} for r in ROWS]


def test_the_source_of_a_map_function_changes_the_key(
    build: Callable[..., PolarDataset], encoded: list[int], mapping: Callable[..., Any]
) -> None:
    """Also that of a function which can be imported, of its helpers and of its constants."""
    for texts in ({}, {"prefix": "Q: "}, {"suffix": " A:"}):
        function = mapping(**texts).from_question
        assert tokenises(build, encoded, rows=QUESTIONS, dataset_map_fn=function)
        function = mapping(**texts).from_question
        assert not tokenises(build, encoded, rows=QUESTIONS, dataset_map_fn=function)


def test_the_arguments_of_a_partial_map_function_change_the_key(
    build: Callable[..., PolarDataset], encoded: list[int], mapping: Callable[..., Any]
) -> None:
    for prefix in ("", "Q: "):
        function = mapping(prefix).from_question
        for more in ("", "!"):
            options = {"rows": QUESTIONS, "dataset_map_fn": partial(function, more=more)}
            assert tokenises(build, encoded, **options)
            assert not tokenises(build, encoded, **options)


def test_what_a_map_function_closes_over_changes_the_key(
    build: Callable[..., PolarDataset], encoded: list[int]
) -> None:
    def asking(text: str) -> Callable[[Raw], Raw]:
        return lambda row: {"prompt": text}

    assert tokenises(build, encoded, rows=QUESTIONS, dataset_map_fn=asking("6 x 7?"))
    assert tokenises(build, encoded, rows=QUESTIONS, dataset_map_fn=asking("6 x 8?"))
    assert not tokenises(build, encoded, rows=QUESTIONS, dataset_map_fn=asking("6 x 7?"))


PROGRAM = """
import sys
from transformers import AutoTokenizer
from polar_xtuner.dataset import PolarDataset
from polar_xtuner.template import PolarTemplate

PolarTemplate.encode = None
data, tokenizer, cache = sys.argv[1:]
dataset = PolarDataset(
    AutoTokenizer.from_pretrained(tokenizer), data, None, "polar_test_mapping.from_question",
    400, 100, cache_dir=cache,
)
print(dataset.store[4].tokens.tolist())
"""


def test_another_process_finds_the_store(
    build: Callable[..., PolarDataset],
    mapping: Callable[..., Any],
    demo_tokenizer: Any,
    tmp_path: Path,
) -> None:
    mapping()
    demo_tokenizer.save_pretrained(tmp_path / "tokenizer")
    dataset = build(QUESTIONS, dataset_map_fn="polar_test_mapping.from_question")
    arguments = [str(tmp_path / name) for name in ("train.jsonl", "tokenizer", "cache")]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == dataset.store[4].tokens.tolist()


def test_without_cache_dir_stores_live_in_the_users_cache(
    build: Callable[..., PolarDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    build(ROWS, cache_dir=None)
    assert len(stores_in(tmp_path / "xdg" / "polar_xtuner")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    build(ROWS, cache_dir=None)
    assert len(stores_in(tmp_path / ".cache" / "polar_xtuner")) == 1


# Map functions.


def test_a_map_function_is_taken_as_such_by_registered_and_by_dotted_name(
    build: Callable[..., PolarDataset], mapping: Callable[..., Any]
) -> None:
    function = mapping("Q: ").from_question
    MAP_FUNC.register_module(module=function, name="polar_test_map")
    try:
        datasets = [
            build(QUESTIONS, dataset_map_fn=map_fn)
            for map_fn in (function, "polar_test_map", "polar_test_mapping.from_question")
        ]
    finally:
        del MAP_FUNC._module_dict["polar_test_map"]
    plain = build([{**r, "prompt": "Q: 6 x 7?"} for r in ROWS])
    for dataset in datasets:
        assert [sequences_of(dataset, n) for n in range(5)] == [
            sequences_of(plain, n) for n in range(5)
        ]


def test_a_map_function_that_raises_makes_its_row_bad(
    build: Callable[..., PolarDataset], encoded: list[int], mapping: Callable[..., Any]
) -> None:
    rows = [QUESTIONS[0], ROWS[1], QUESTIONS[2]]
    with pytest.raises(BadRowsError) as error:
        build(rows, dataset_map_fn=mapping().from_question)
    assert [(e.line, e.field) for e in error.value.errors] == [(2, "dataset_map_fn")]
    assert encoded == []


# Hugging Face datasets.


def all_sequences(dataset: PolarDataset) -> list[list[list[int]]]:
    return [sequences_of(dataset, n) for n in range(len(dataset.store))]


def as_messages(rows: list[Raw]) -> list[Raw]:
    """Rows written as upstream's: their texts are messages."""
    roles = {"prompt": "user", "reference": "assistant", "chosen": "assistant"}
    return [
        {k: [{"role": roles.get(k, "assistant"), "content": v}] for k, v in r.items()} for r in rows
    ]


def test_a_hugging_face_dataset_gives_the_groups_of_its_file(
    build: Callable[..., PolarDataset], encoded: list[int], tmp_path: Path
) -> None:
    plain = build(as_messages(ROWS))
    config = ConfigDict(
        type=load_dataset,
        path="json",
        data_files=str(tmp_path / "train.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "hf"),
    )
    whole = {k: v for k, v in config.items() if k != "split"}
    from_split = build(dataset=config)
    assert all_sequences(from_split) == all_sequences(plain)
    assert all_sequences(build(dataset=whole)) == all_sequences(plain)
    before = len(encoded)
    build(dataset=config)
    assert len(encoded) == before, "a second start tokenised again"


def test_the_train_split_of_a_dataset_dict_is_taken(build: Callable[..., PolarDataset]) -> None:
    train, test = HFDataset.from_list(ROWS), HFDataset.from_list([row(99)])
    splits = DatasetDict({"test": test, "train": train})
    assert all_sequences(build(dataset=splits)) == all_sequences(build(ROWS))
    with pytest.raises(ValueError, match=r"'test'.*split="):
        build(dataset=DatasetDict({"test": test}))


def test_a_map_function_maps_the_rows_of_a_hugging_face_dataset(
    build: Callable[..., PolarDataset], mapping: Callable[..., Any]
) -> None:
    dataset = build(
        dataset=HFDataset.from_list(QUESTIONS), dataset_map_fn=mapping("Q: ").from_question
    )
    plain = build([{**r, "prompt": "Q: 6 x 7?"} for r in ROWS])
    assert all_sequences(dataset) == all_sequences(plain)


def test_the_content_of_a_hugging_face_dataset_changes_the_key(
    build: Callable[..., PolarDataset], encoded: list[int]
) -> None:
    assert tokenises(build, encoded, dataset=HFDataset.from_list(ROWS))
    assert not tokenises(build, encoded, dataset=HFDataset.from_list(ROWS))
    assert tokenises(build, encoded, dataset=HFDataset.from_list([*ROWS, row(7)]))
    mapped = HFDataset.from_list(ROWS).map(lambda r: {"chosen": r["chosen"] + "!"})
    assert tokenises(build, encoded, dataset=mapped)
    assert tokenises(build, encoded, dataset=HFDataset.from_list(ROWS), dataset_map_fn=dict)


def test_a_bad_row_of_a_hugging_face_dataset_is_named(
    build: Callable[..., PolarDataset], encoded: list[int]
) -> None:
    with pytest.raises(BadRowsError) as error:
        build(dataset=HFDataset.from_list([row(0), row(1, chosen=None), row(2)]))
    assert [(e.file, e.line, e.field) for e in error.value.errors] == [("dataset", 2, "chosen")]
    assert encoded == []


# Packs.


def test_a_pack_is_its_groups_their_weight_and_where_their_rows_stand(
    build: Callable[..., PolarDataset], tmp_path: Path
) -> None:
    files = [write(tmp_path / "a.jsonl", ROWS[:2]), write(tmp_path / "b.jsonl", ROWS[2:])]
    dataset = build(data_files=files)
    pack = dataset[pack_of(dataset, (3, 0), 0.25)]
    assert pack["pair_weight"] == 0.25
    assert pack["rows"] == [f"{files[1]}:2", f"{files[0]}:1"]
    for group, number in zip(pack["groups"], (3, 0), strict=True):
        for ours, stored in zip(group, dataset.store[number], strict=True):
            assert np.array_equal(ours, stored)


def test_labels_mark_chosen_with_0_and_rejected_with_1_at_their_reward_tokens(
    build: Callable[..., PolarDataset], demo_tokenizer: Any
) -> None:
    dataset = build([row(0, chosen=["a", "b"], rejected=["c", "d", "a!"]), row(1)])
    pack = dataset[0]
    ids, labels = np.array(pack["input_ids"]), np.array(pack["labels"])
    reward = demo_tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_130]")
    assert (labels != -100).tolist() == (ids == reward).tolist()
    of_row = {"1": [0, 1, 1, 1, 0], "2": [0, 1]}
    expected = [label for place in pack["rows"] for label in of_row[place.rpartition(":")[2]]]
    assert len(expected) == 7
    assert labels[labels != -100].tolist() == expected


def test_as_a_sequence_a_dataset_is_the_packs_of_an_epoch(
    build: Callable[..., PolarDataset],
) -> None:
    dataset = build(some_rows(60), max_packed_length=500)
    packs = [*dataset]
    assert len(packs) == len(dataset) > 5
    places = [place for pack in packs for place in pack["rows"]]
    assert len(places) == len(set(places)) == 60
    assert all(len(pack["input_ids"]) <= 500 for pack in packs)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_pack_that_is_collated_holds_the_sequences_of_its_rows(
    build: Callable[..., PolarDataset],
) -> None:
    dataset = build(some_rows(20))
    data = collate_pack([dataset[pack_of(dataset, (3, 11, 7))]])["data"]
    layout = PackLayout(**data["layout"])
    keys = layout.gather(data["input_ids_T"][:, None, None])[:, 0, 0]
    sequences = [piece.tolist() for piece in keys.split(layout.key_lengths)]
    assert sequences == [s for n in (3, 11, 7) for s in sequences_of(dataset, n)]


def test_workers_serve_the_packs_of_a_plan(build: Callable[..., PolarDataset]) -> None:
    dataset = build(some_rows(60), max_packed_length=500)
    lengths, pairs = dataset.lengths, dataset.pair_counts
    plan = plan_epoch(lengths, pairs, lengths, 500, pairs_per_step=40, ranks=2, accumulation=20)
    packs = [plan.pack(iteration, 1) for iteration in range(plan.iterations)]
    assert any(share.stop < pairs[share.group] for pack in packs for share in pack.shares)
    loader = DataLoader(
        dataset, batch_size=1, sampler=packs, num_workers=2, collate_fn=collate_pack
    )
    served = list(loader)
    assert len(served) == len(packs)
    for batch, pack in zip(served, packs):
        alone = collate_pack([dataset[pack]])
        assert batch["data_samples"]["rows"] == alone["data_samples"]["rows"]
        assert (batch["data_samples"]["pairs"] == alone["data_samples"]["pairs"]).all()
        assert batch["data"]["input_ids_T"].tolist() == alone["data"]["input_ids_T"].tolist()
        assert batch["data"]["pair_weights_P"].tolist() == alone["data"]["pair_weights_P"].tolist()


def test_a_pickled_dataset_holds_no_tokens(build: Callable[..., PolarDataset]) -> None:
    dataset = build(some_rows(500))
    pickled = pickle.dumps(dataset)
    assert len(pickled) < dataset.store.lengths.sum()
    assert all_sequences(pickle.loads(pickled)) == all_sequences(dataset)


# xtuner.


@pytest.mark.parametrize("registry", [BUILDER, DATASETS])
@pytest.mark.parametrize("name", [PolarDataset, "PolarDataset"])
def test_a_config_can_name_the_dataset_and_the_config_of_its_tokenizer(
    registry: Any, name: Any, demo_tokenizer: Any, tmp_path: Path
) -> None:
    demo_tokenizer.save_pretrained(tmp_path / "tokenizer")
    dataset = registry.build(
        ConfigDict(
            type=name,
            data_files=str(write(tmp_path / "train.jsonl", ROWS)),
            tokenizer=dict(
                type="transformers.AutoTokenizer.from_pretrained",
                pretrained_model_name_or_path=str(tmp_path / "tokenizer"),
            ),
            cache_dir=str(tmp_path / "cache"),
        )
    )
    assert len(dataset.store) == 5


CONFIG = """
custom_imports = dict(imports=["polar_xtuner.dataset"])
tokenizer = dict(
    type="transformers.AutoTokenizer.from_pretrained",
    pretrained_model_name_or_path={tokenizer!r},
)
train_dataloader = dict(
    dataset=dict(
        type="PolarDataset", data_files={data!r}, tokenizer=tokenizer, cache_dir={cache!r}
    )
)
"""


def test_xtuner_log_dataset_shows_the_first_pack(
    demo_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from xtuner.tools import log_dataset

    demo_tokenizer.save_pretrained(tmp_path / "tokenizer")
    raw = row(chosen="It is 42.", rejected="It is 36.")
    config = CONFIG.format(
        tokenizer=str(tmp_path / "tokenizer"),
        data=str(write(tmp_path / "train.jsonl", [raw])),
        cache=str(tmp_path / "cache"),
    )
    (tmp_path / "config.py").write_text(config)
    monkeypatch.setattr(sys, "argv", ["log_dataset", str(tmp_path / "config.py"), "--show", "all"])
    log_dataset.main()
    shown = capsys.readouterr().out
    half = f"{raw['prompt']}\nIt is "
    assert (
        f"<s>{raw['prompt']}\n{raw['reference']}<|reward|>{half}42.[UNUSED_TOKEN_130]"
        "36.[UNUSED_TOKEN_130]"
    ) in shown
