import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polar_xtuner import cache
from polar_xtuner.cache import ARRAYS, Block, StoreWriter, TokenStore, lay_out, open_or_build

REWARD = 9  # ends every sequence and stands nowhere else in it

sequences = st.lists(st.integers(0, 2), max_size=8).map(lambda ids: [1, *ids, REWARD])
groups = st.lists(sequences, min_size=1, max_size=6, unique_by=tuple)


def pieces_of(tokens: Any, lengths: Any) -> list[list[int]]:
    ends = np.cumsum(lengths)
    assert ends[-1] == len(tokens)
    return [[int(i) for i in tokens[end - n : end]] for end, n in zip(ends, lengths)]


def sequences_of(tokens: Any, lengths: Any) -> list[list[int]]:
    prefix, *suffixes = pieces_of(tokens, lengths)
    return [prefix + suffix for suffix in suffixes]


# Layout.


@given(groups)
@example([[1, REWARD]])
@example([[1, 0, REWARD], [1, REWARD]])
@example([[1, 0, 0, REWARD], [1, 0, REWARD], [1, 0, 0, 0, REWARD]])
def test_pieces_rebuild_the_sequences_and_the_prefix_is_the_longest_they_share(
    group: list[list[int]],
) -> None:
    tokens, lengths = lay_out(group)
    assert sequences_of(tokens, lengths) == group
    _, *suffixes = pieces_of(tokens, lengths)
    assert all(suffixes)
    if len(group) > 1:
        assert len({suffix[0] for suffix in suffixes}) > 1, "they share one more id"


def test_the_last_id_is_never_shared_even_of_a_single_sequence() -> None:
    assert lay_out([[1, 2, REWARD]]) == ([1, 2, REWARD], [2, 1])


# A store holds what was added to it.


def build(*content: tuple[list[list[int]], list[tuple[int, int, float]], tuple[int, ...]]) -> Any:
    def build_store(writer: StoreWriter) -> dict[str, Any]:
        for group, pairs, row in content:
            write(writer, group, pairs, row)
        return {"rows": len(content)}

    return build_store


def write(writer: StoreWriter, group: Any, pairs: Any, row: tuple[int, ...]) -> None:
    block = Block()
    block.add(group, [(*pair, *row) for pair in pairs])
    writer.write(block.arrays())


PAIR_OF_TWO = ([[1, 2, 3, REWARD], [1, 2, REWARD]], [(0, 1, 0.25)], (0, 1, 0, 0, 0, 9, 3))
GROUP_OF_THREE = (
    [[1, 5, REWARD], [1, 6, 6, REWARD], [1, 7, REWARD]],
    [(0, 2, -1e-9), (1, 2, 0.1)],
    (1, 2**40, 3, 1, 2, 2**20, 0),
)


@settings(max_examples=40)
@given(
    content=st.lists(
        st.tuples(
            groups,
            st.lists(
                st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(allow_nan=False)),
                min_size=1,
                max_size=3,
            ),
            st.tuples(st.integers(0, 9), st.integers(1, 2**62), *[st.integers(0, 2**31 - 1)] * 5),
        ),
        max_size=4,
    )
)
def test_a_store_gives_back_every_group_pair_margin_and_row_however_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, content: list[Any]
) -> None:
    content = [
        (group, [(c % len(group), r % len(group), m) for c, r, m in pairs], row)
        for group, pairs, row in content
    ]
    folder = tmp_path_factory.mktemp("cache")
    store = open_or_build(folder, "key", build(*content))
    assert len(store) == len(content)
    for i, (group, pairs, row) in enumerate(content):
        assert sequences_of(store[i].tokens, store[i].pieces) == group
        assert store[i].pairs.tolist() == [(*pair, *row) for pair in pairs]
    assert store.lengths.tolist() == [len(lay_out(group)[0]) for group, _, _ in content]
    assert store.pair_counts.tolist() == [len(pairs) for _, pairs, _ in content]
    unshared = [sum(len(g[c]) + len(g[r]) for c, r, _ in pairs) for g, pairs, _ in content]
    assert store.unshared_lengths().tolist() == unshared
    assert store.attended.tolist() == [seen(group) for group, _, _ in content]
    assert store.meta["rows"] == len(content)

    def in_one_block(writer: StoreWriter) -> dict[str, Any]:
        block = Block()
        for group, pairs, row in content:
            block.add(group, [(*pair, *row) for pair in pairs])
        writer.write(block.arrays())
        return {"rows": len(content)}

    open_or_build(folder, "other", in_one_block)
    for name in ARRAYS:
        assert (folder / "key" / name).read_bytes() == (folder / "other" / name).read_bytes()
    shutil.rmtree(folder)


def seen(group: list[list[int]]) -> int:
    """Keys that each token of a group sees, one by one."""
    _, (prefix, *suffixes) = lay_out(group)
    return sum(range(1, prefix + 1)) + sum(
        prefix + i for suffix in suffixes for i in range(1, suffix + 1)
    )


@given(group=groups, data=st.data())
def test_some_pairs_of_a_group_keep_their_candidates_margins_and_rows(
    group: list[list[int]], data: st.DataObject
) -> None:
    numbers = st.integers(0, len(group) - 1)
    pairs = data.draw(
        st.lists(
            st.tuples(numbers, numbers, st.floats(0, 1), *[st.integers(0, 99)] * 7),
            min_size=1,
            max_size=8,
        )
    )
    chosen = data.draw(st.lists(st.sampled_from(range(len(pairs))), min_size=1, unique=True))
    block = Block()
    block.add(group, pairs)
    arrays = block.arrays()
    whole = cache.Group(arrays["tokens"], arrays["pieces"], arrays["pairs"])
    part = whole.only(chosen)
    candidates = sequences_of(part.tokens, part.pieces)

    def spelled(sequences: Any, pairs: Any) -> Any:
        return [(sequences[c], sequences[r], *rest) for c, r, *rest in pairs]

    wanted = spelled(group, [pairs[i] for i in chosen])
    assert spelled(candidates, part.pairs.tolist()) == wanted
    assert len(candidates) == len({n for i in chosen for n in pairs[i][:2]})
    assert whole.pairs.tolist() == pairs


def test_the_largest_ids_and_offsets_are_kept(tmp_path: Path) -> None:
    store = open_or_build(tmp_path, "key", build(([[1, 2**32 - 1]], [], (0,) * 7)))
    assert store[0].tokens.tolist() == [1, 2**32 - 1]


# Building.


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Counted:
    """A build that counts its calls."""

    def __init__(self, *content: Any) -> None:
        self.calls = 0
        self._build = build(*(content or (PAIR_OF_TWO, GROUP_OF_THREE)))

    def __call__(self, writer: StoreWriter) -> dict[str, Any]:
        self.calls += 1
        return self._build(writer)


def holds_both_groups(store: TokenStore) -> bool:
    return [sequences_of(g.tokens, g.pieces) for g in store] == [PAIR_OF_TWO[0], GROUP_OF_THREE[0]]


def test_a_second_open_does_not_build_again(tmp_path: Path) -> None:
    counted = Counted()
    first, second = (open_or_build(tmp_path / "a" / "b", "key", counted) for _ in range(2))
    assert counted.calls == 1
    assert holds_both_groups(first) and holds_both_groups(second)


def test_another_key_is_another_store(tmp_path: Path) -> None:
    counted = Counted()
    open_or_build(tmp_path, "key", counted)
    open_or_build(tmp_path, "other", counted)
    assert counted.calls == 2


def test_a_finished_build_leaves_the_store_and_its_lock_only(tmp_path: Path) -> None:
    open_or_build(tmp_path, "key", Counted())
    assert names_in(tmp_path) == {"key", "key.lock"}
    assert names_in(tmp_path / "key") == {*ARRAYS, "meta.json"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_a_build_that_raises_leaves_nothing_and_the_next_start_builds(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def break_off(writer: StoreWriter) -> dict[str, Any]:
        write(writer, *PAIR_OF_TWO)
        raise error("midway")

    with pytest.raises(error, match="midway"):
        open_or_build(tmp_path, "key", break_off)
    assert names_in(tmp_path) == {"key.lock"}
    assert holds_both_groups(open_or_build(tmp_path, "key", Counted()))


SLOW_BUILD = """
import sys, time
from pathlib import Path
from polar_xtuner.cache import Block, open_or_build

def build(writer):
    print("building", flush=True)
    for number in range(int(sys.argv[2])):
        block = Block()
        block.add([[1, 2, 9], [1, number, 3, 9]], [(0, 1, 0.0, 0, number, 0, 0, 0, 1, 2)])
        writer.write(block.arrays())
        time.sleep(float(sys.argv[3]))
    return {}

store = open_or_build(Path(sys.argv[1]), "key", build)
print(len(store), int(store.lengths.sum()))
"""


def start_build(folder: Path, groups: int, pause: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, str(folder), str(groups), str(pause)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_build_killed_midway_is_not_taken_for_complete(tmp_path: Path) -> None:
    process = start_build(tmp_path, 100_000, 0.01)
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert any(name.endswith(".partial") for name in names_in(tmp_path)), "killed too late"
    counted = Counted()
    assert holds_both_groups(open_or_build(tmp_path, "key", counted))
    assert counted.calls == 1
    assert names_in(tmp_path) == {"key", "key.lock"}


def test_a_build_killed_between_its_last_array_and_its_rename_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill leaves at the worst moment: whole, but not under the key's name."""
    monkeypatch.setattr(cache.Path, "rename", lambda *_: os._exit(1))
    child = os.fork()
    if child == 0:
        open_or_build(tmp_path, "key", Counted())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    monkeypatch.undo()
    left = next(p for p in tmp_path.iterdir() if p.name.endswith(".partial"))
    assert names_in(left) == {*ARRAYS, "meta.json"}
    counted = Counted()
    assert holds_both_groups(open_or_build(tmp_path, "key", counted))
    assert counted.calls == 1
    assert names_in(tmp_path) == {"key", "key.lock"}


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_build_one_key_at_once_build_it_once(tmp_path: Path, count: int) -> None:
    processes = [start_build(tmp_path, 40, 0.02) for _ in range(count)]
    outputs = [process.communicate(timeout=60)[0].split("\n") for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    assert sum(output.count("building") for output in outputs) == 1
    # Each group has 1 + 2 + 3 ids, and the one whose number is an id of both shares that as well.
    assert {output[-2] for output in outputs} == {f"40 {40 * 6 - 1}"}
    assert names_in(tmp_path) == {"key", "key.lock"}


def test_where_the_lock_does_not_reach_the_first_rename_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines on one file system: both build, neither fails, one store stays."""
    inner = Counted()

    def build_while_another_machine_does(writer: StoreWriter) -> dict[str, Any]:
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
        cache._build(tmp_path / "key", inner)  # without the lock, which the outer build holds
        return Counted()(writer)

    store = open_or_build(tmp_path, "key", build_while_another_machine_does)
    assert inner.calls == 1
    assert holds_both_groups(store)
    assert names_in(tmp_path) == {"key", "key.lock"}


def test_a_machine_does_not_remove_what_another_one_is_building(tmp_path: Path) -> None:
    (tmp_path / "key.another-host.1.partial").mkdir(parents=True)
    (tmp_path / f"key.{socket.gethostname()}.1.partial").mkdir()
    open_or_build(tmp_path, "key", Counted())
    assert names_in(tmp_path) == {"key", "key.lock", "key.another-host.1.partial"}


# Damage.


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = [
    *((name, damage) for name in ARRAYS for damage in (Path.unlink, empty, cut_short, lengthen)),
    *(("meta.json", damage) for damage in (Path.unlink, empty, cut_short, fill_with_zeros)),
    *(
        ("meta.json", lambda path, text=text: path.write_text(text))
        for text in ("{}", "[]", "null", '{"sizes": {"tokens": 44}}', '{"sizes": 3}')
    ),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_store_is_noticed_and_built_again(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    open_or_build(tmp_path, "key", Counted())
    damage(tmp_path / "key" / name)
    counted = Counted()
    assert holds_both_groups(open_or_build(tmp_path, "key", counted))
    assert counted.calls == 1
    assert names_in(tmp_path) == {"key", "key.lock"}
    open_or_build(tmp_path, "key", counted)
    assert counted.calls == 1


# Where nothing can be written.


def test_a_cache_dir_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError) as error:
        open_or_build(tmp_path / "cache", "key", Counted())
    assert str(tmp_path / "cache") in str(error.value)
    assert "set cache_dir to" in str(error.value)


def test_a_cache_dir_without_write_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):  # for root nothing is read-only
        monkeypatch.setattr(
            cache.Path, "mkdir", lambda path, **_: (_ for _ in ()).throw(PermissionError(13, "no"))
        )
    with pytest.raises(OSError) as error:
        open_or_build(tmp_path / "cache", "key", Counted())
    tmp_path.chmod(0o755)
    assert str(tmp_path / "cache") in str(error.value)


def test_a_full_disk_is_an_error_that_names_the_cache_and_leaves_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left") as error:
        open_or_build(tmp_path, "key", Counted())
    assert str(tmp_path) in str(error.value)
    assert names_in(tmp_path) == {"key.lock"}


def test_a_complete_store_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_or_build(tmp_path, "key", Counted())
    monkeypatch.setattr(cache, "_lock", None)  # would raise if it were used
    for path in (tmp_path, tmp_path / "key"):
        path.chmod(0o555)
    store = open_or_build(tmp_path, "key", Counted())
    assert holds_both_groups(store)
    for path in (tmp_path, tmp_path / "key"):
        path.chmod(0o755)


# Many processes.


@pytest.fixture
def large(tmp_path: Path) -> TokenStore:
    content = [
        ([[1, i, *range(10, 1000), REWARD], [1, i, REWARD]], [(0, 1, 0.0)], (0, i, 0, 0, 0, 1, 1))
        for i in range(300)
    ]
    return open_or_build(tmp_path, "key", build(*content))


def test_a_pickled_store_is_small_and_reads_the_same(large: TokenStore) -> None:
    pickled = pickle.dumps(large)
    assert len(pickled) < 1000 < large.lengths.sum()
    again = pickle.loads(pickled)
    assert len(again) == len(large)
    assert all(
        np.array_equal(a, b) for i in range(300) for a, b in zip(again[i], large[i], strict=True)
    )


def test_the_arrays_are_mapped_and_cannot_be_written(large: TokenStore) -> None:
    group = large[7]
    assert isinstance(group.tokens, np.memmap)
    assert not group.tokens.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        group.tokens[0] = 3


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_dataloader_read_the_store(large: TokenStore, method: str) -> None:
    from torch.utils.data import DataLoader

    loader = DataLoader(
        large,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=2,
        collate_fn=_as_lists,
        multiprocessing_context=multiprocessing.get_context(method),
    )
    read = list(loader)
    assert read == [_as_lists(large[i]) for i in range(300)]


def _as_lists(group: cache.Group) -> Iterator[Any] | list[Any]:
    return [array.tolist() for array in group]
