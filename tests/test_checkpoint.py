"""Checkpoints are whole, sound and safe, or not there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub

from polar_xtuner import checkpoint
from polar_xtuner.checkpoint import (
    CheckpointError,
    PolarCheckpointHook,
    atomic_file,
    check_checkpoint,
    newest_sound,
)

STATE = {"state_dict": {"a": torch.arange(40.0), "b": torch.ones(3)}, "meta": {"iter": 3}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save(STATE, tmp_path / "iter_3.pth")
    return tmp_path / "iter_3.pth"


def damage(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(40.0).numpy().tobytes()) + 17] ^= 4
    path.write_bytes(data)
    return path


# ---- Reading


def test_a_sound_checkpoint_passes(saved: Path) -> None:
    check_checkpoint(saved)


def test_wherever_a_byte_is_flipped_it_is_found_or_nothing_that_is_read_has_changed(
    saved: Path, tmp_path: Path
) -> None:
    whole = saved.read_bytes()
    flipped, found = tmp_path / "flipped.pth", 0
    for place in range(len(whole)):
        flipped.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            check_checkpoint(flipped)
        except CheckpointError as error:
            assert str(flipped) in str(error)
            found += 1
        else:
            state = torch.load(flipped)
            assert state["meta"] == STATE["meta"]
            assert state["state_dict"]["a"].equal(STATE["state_dict"]["a"])
            assert state["state_dict"]["b"].equal(STATE["state_dict"]["b"])
    assert found > len(whole) / 3


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_named(share: float, saved: Path) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"iter_3\.pth .* truncated"):
        check_checkpoint(saved)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .*iter_9\.pth"):
        check_checkpoint(tmp_path / "iter_9.pth")


class Hostile:
    def __init__(self, function: Any, *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("way", ["system", "getattr", "eval"])
def test_a_hostile_pickle_is_refused_and_never_run(way: str, tmp_path: Path) -> None:
    path, ran = tmp_path / "iter_1.pth", tmp_path / "ran"
    call = {
        "system": Hostile(os.system, f"touch {ran}"),
        "getattr": Hostile(getattr, torch.Tensor, "numpy"),
        "eval": Hostile(eval, f"open({str(ran)!r}, 'w')"),
    }[way]
    torch.save({**STATE, "message_hub": call}, path)
    with pytest.raises(CheckpointError, match=r"iter_1\.pth is refused"):
        check_checkpoint(path)
    assert not ran.exists()


def deepspeed_folder(path: Path, ranks: int = 2) -> Path:
    path.mkdir()
    torch.save({"module": {}, "dp_world_size": ranks}, path / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        torch.save(STATE, path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return path


def test_every_file_of_a_deepspeed_folder_is_looked_through(tmp_path: Path) -> None:
    folder = deepspeed_folder(tmp_path / "iter_1.pth")
    check_checkpoint(folder)
    part = damage(folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match=part.name):
        check_checkpoint(folder)
    check_checkpoint(folder, part=0, parts=3)  # its files by turns
    part.unlink()
    with pytest.raises(CheckpointError, match=r"optim_states\.pt of 1 of 2 processes"):
        check_checkpoint(folder)


def test_zero3_needs_the_weights_of_every_process(tmp_path: Path) -> None:
    folder = deepspeed_folder(tmp_path / "iter_1.pth")
    states = folder / "mp_rank_00_model_states.pt"
    for rank in (0, 1):
        (folder / f"zero_pp_rank_{rank}_{states.name}").write_bytes(states.read_bytes())
    states.unlink()
    check_checkpoint(folder)
    (folder / f"zero_pp_rank_1_{states.name}").unlink()
    with pytest.raises(CheckpointError, match=r"model_states\.pt of 1 of 2 processes"):
        check_checkpoint(folder)


def test_deepspeed_without_zero_keeps_its_optimizer_with_the_weights(tmp_path: Path) -> None:
    folder = deepspeed_folder(tmp_path / "iter_1.pth", ranks=0)
    state = {"module": {}, "dp_world_size": 2, "optimizer": {"state": {}}}
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    check_checkpoint(folder)


def test_the_newest_sound_checkpoint_is_found_past_damaged_ones(tmp_path: Path) -> None:
    assert newest_sound(tmp_path) is None
    for number in (5, 10, 20):
        torch.save(STATE, tmp_path / f"iter_{number}.pth")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_20.pth"))
    assert newest_sound(tmp_path) == tmp_path / "iter_20.pth"
    damage(tmp_path / "iter_20.pth")
    assert newest_sound(tmp_path) == tmp_path / "iter_10.pth"
    (tmp_path / "iter_10.pth").write_bytes(b"PK")
    assert newest_sound(tmp_path) == tmp_path / "iter_5.pth"
    damage(tmp_path / "iter_5.pth")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is sound"):
        newest_sound(tmp_path)


def test_a_checkpoint_counts_from_the_moment_it_is_there_not_when_it_is_named(
    tmp_path: Path,
) -> None:
    torch.save(STATE, tmp_path / "iter_10.pth")
    torch.save(STATE, tmp_path / "iter_30.pth")  # of an earlier run in the same folder
    pointer = tmp_path / "last_checkpoint"
    pointer.write_text(str(tmp_path / "iter_10.pth"))
    os.utime(tmp_path / "iter_30.pth", ns=(0, pointer.stat().st_mtime_ns - 10**9))
    assert newest_sound(tmp_path) == tmp_path / "iter_10.pth"
    torch.save(STATE, tmp_path / "iter_20.pth")
    os.utime(tmp_path / "iter_20.pth", ns=(0, pointer.stat().st_mtime_ns + 10**9))
    assert newest_sound(tmp_path) == tmp_path / "iter_20.pth"


def test_a_work_dir_that_was_moved_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "iter_10.pth")
    torch.save(STATE, tmp_path / "iter_9.pth")
    (tmp_path / "last_checkpoint").write_text("/elsewhere/iter_9.pth")
    for number in (9, 10):
        os.utime(tmp_path / f"iter_{number}.pth", ns=(0, 0))
    assert newest_sound(tmp_path) == tmp_path / "iter_9.pth"


# ---- Writing


def test_a_file_takes_the_place_of_another_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), atomic_file(path) as file:
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == b"old"
        raise KeyError
    assert path.read_bytes() == b"old"
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert [*tmp_path.iterdir()] == [path]


class FakeRunner(SimpleNamespace):
    """As much of a runner as the hook asks for; its checkpoints have `size` numbers."""

    def __init__(self, work_dir: Path, size: int = 100) -> None:
        super().__init__(
            work_dir=str(work_dir),
            iter=-1,
            epoch=0,
            train_loop=SimpleNamespace(_iter=0),
            size=size,
            model=None,
            logger=checkpoint.logger,
            message_hub=MessageHub.get_instance(f"hub {work_dir}"),
        )

    def save_checkpoint(self, out_dir: str, filename: str, **options: Any) -> None:
        with atomic_file(Path(out_dir, filename)) as file:
            torch.save({"numbers": torch.zeros(self.size), "meta": options["meta"]}, file)


def hook_of(runner: FakeRunner, keep: int = 2, **options: Any) -> PolarCheckpointHook:
    hook = PolarCheckpointHook(interval=1, by_epoch=False, max_keep_ckpts=keep, **options)
    hook.before_train(runner)
    return hook


def save(hook: PolarCheckpointHook, runner: FakeRunner, number: int, size: int = 100) -> bool:
    runner.iter, runner.size = number - 1, size
    return hook.save(runner)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("keep", [1, 2])
def test_an_old_checkpoint_goes_only_when_a_newer_one_is_there(keep: int, tmp_path: Path) -> None:
    runner = FakeRunner(tmp_path)
    hook = hook_of(runner, keep)
    seen = []
    write = runner.save_checkpoint

    def watched(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        seen.append(names(tmp_path))

    runner.save_checkpoint = watched
    for number in (1, 2, 3):
        assert save(hook, runner, number)
    assert {f"iter_{n}.pth" for n in range(1, keep + 1)} <= seen[keep]
    assert names(tmp_path) == {f"iter_{n}.pth" for n in range(4 - keep, 4)} | {"last_checkpoint"}


def test_a_full_disk_is_reported_and_leaves_the_last_good_checkpoint(
    small_disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.logger, "propagate", True)
    runner = FakeRunner(small_disk)
    hook = hook_of(runner, keep=1)
    assert save(hook, runner, 1)
    assert not save(hook, runner, 2, size=2 * 10**6)
    assert names(small_disk) == {"iter_1.pth", "last_checkpoint"}
    assert hook._failure.startswith(f"the checkpoint {small_disk}/iter_2.pth could not be written")
    assert "No space left on device" in hook._failure
    assert f"last good one is {small_disk}/iter_1.pth" in hook._failure
    with pytest.raises(CheckpointError, match="No space left"):
        hook.after_train(runner)
    assert save(hook, runner, 3)
    assert names(small_disk) == {"iter_3.pth", "last_checkpoint"}
    hook.after_train(runner)


def test_a_disk_that_cannot_be_written_any_more_is_reported(small_disk: Path) -> None:
    runner = FakeRunner(small_disk)
    hook = hook_of(runner)
    assert save(hook, runner, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert not save(hook, runner, 2)
    assert "Read-only file system" in hook._failure
    assert names(small_disk) == {"iter_1.pth", "last_checkpoint"}


def test_what_could_not_be_read_again_is_not_kept(tmp_path: Path) -> None:
    runner = FakeRunner(tmp_path)
    hook = hook_of(runner, keep=1)
    assert save(hook, runner, 1)
    write = runner.save_checkpoint

    def with_a_path(*args: Any, meta: dict[str, Any], **options: Any) -> None:
        write(*args, meta={**meta, "where": tmp_path}, **options)

    runner.save_checkpoint = with_a_path
    assert not save(hook, runner, 2)
    assert "asks for pathlib" in hook._failure
    assert names(tmp_path) == {"iter_1.pth", "last_checkpoint"}


def test_what_numpy_keeps_in_a_checkpoint_is_safe(tmp_path: Path) -> None:
    values = [np.dtype(kind).type(1) for kind in ("f2", "f8", "i2", "u1", "u8", "b1")]
    torch.save({**STATE, "values": values, "array": np.ones(3, "u1")}, tmp_path / "x.pth")
    check_checkpoint(tmp_path / "x.pth")


def test_what_a_killed_writer_left_is_cleared_and_what_it_replaced_comes_back(
    tmp_path: Path,
) -> None:
    deepspeed_folder(tmp_path / ".iter_3.pth.partial")
    deepspeed_folder(tmp_path / ".iter_2.pth.old")
    deepspeed_folder(tmp_path / ".iter_1.pth.old")
    deepspeed_folder(tmp_path / "iter_1.pth")
    hook_of(FakeRunner(tmp_path))
    assert names(tmp_path) == {"iter_1.pth", "iter_2.pth"}


def test_a_good_folder_stays_where_there_is_nothing_to_take_its_place(tmp_path: Path) -> None:
    """As a file system of several nodes may have it, whose listings are late."""
    final = deepspeed_folder(tmp_path / "iter_1.pth")
    assert checkpoint._move(tmp_path / ".iter_1.pth.partial", final)
    check_checkpoint(final)


def test_what_was_being_replaced_counts_when_a_run_looks_for_its_newest(tmp_path: Path) -> None:
    deepspeed_folder(tmp_path / ".iter_2.pth.old")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_2.pth"))
    assert newest_sound(tmp_path) == tmp_path / "iter_2.pth"


def test_a_folder_that_is_removed_is_never_seen_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = deepspeed_folder(tmp_path / "iter_1.pth")
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path: None)  # killed here
    checkpoint._remove(folder)
    assert all(name.endswith(".partial") for name in names(tmp_path))
    monkeypatch.undo()
    checkpoint._clear(tmp_path)
    assert not names(tmp_path)


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    new = deepspeed_folder(tmp_path / ".iter_1.pth.partial", ranks=3)
    deepspeed_folder(tmp_path / "iter_1.pth", ranks=2)
    assert checkpoint._move(new, tmp_path / "iter_1.pth") == []
    assert names(tmp_path) == {"iter_1.pth"}
    assert len([*(tmp_path / "iter_1.pth").iterdir()]) == 4


def test_one_iteration_is_saved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeRunner(tmp_path)
    hook = hook_of(runner)
    assert save(hook, runner, 4)
    monkeypatch.setattr(runner, "save_checkpoint", None)
    assert save(hook, runner, 4)


def test_the_best_checkpoint_of_another_run_stays(tmp_path: Path) -> None:
    other = tmp_path / "other" / "best_accuracy_iter_1.pth"
    other.parent.mkdir()
    torch.save(STATE, other)
    runner = FakeRunner(tmp_path)
    hook = hook_of(runner, save_best="accuracy", rule="greater")
    runner.message_hub.update_info("best_score", 0.1)
    runner.message_hub.update_info("best_ckpt", str(other))
    runner.iter = 1
    hook.after_val_epoch(runner, {"accuracy": 0.2})
    assert other.exists()
    assert (tmp_path / "best_accuracy_iter_1.pth").exists()


def test_the_best_checkpoint_stays_until_a_better_one_is_there(tmp_path: Path) -> None:
    runner = FakeRunner(tmp_path)
    hook = hook_of(runner, save_best="accuracy", rule="greater")

    def validate(number: int, accuracy: float, size: int = 100) -> None:
        save(hook, runner, number)
        runner.iter, runner.size = number, size
        hook.after_val_epoch(runner, {"accuracy": accuracy})

    validate(1, 0.7)
    validate(2, 0.6)
    assert {"best_accuracy_iter_1.pth", "iter_1.pth", "iter_2.pth"} <= names(tmp_path)
    validate(3, 0.8)
    assert "best_accuracy_iter_3.pth" in names(tmp_path)
    assert "best_accuracy_iter_1.pth" not in names(tmp_path)
    assert runner.message_hub.get_info("best_score") == 0.8
    assert runner.message_hub.get_info("best_ckpt") == str(tmp_path / "best_accuracy_iter_3.pth")
