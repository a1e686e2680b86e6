"""Runs that are stopped, damaged and resumed, in one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook

from polar_xtuner import checkpoint, resume
from polar_xtuner.checkpoint import CheckpointError, load_safely
from polar_xtuner.engine import PolarTrainLoop
from polar_xtuner.interruption import STOPPED

torch.set_num_threads(1)


class StopAfter(Hook):
    """Sends this process a signal after an iteration, counted from 1."""

    def __init__(self, iteration: int, number: int = signal.SIGUSR1) -> None:
        self._place = iteration, number

    def after_train_iter(self, runner: Any, batch_idx: int, **kwargs: Any) -> None:
        if runner.iter + 1 == self._place[0]:
            os.kill(os.getpid(), self._place[1])
            while not runner.train_loop.interruption.is_due():
                pass


def stop(runner: Any, iteration: int, number: int = signal.SIGUSR1) -> None:
    """Train until a signal after that iteration has ended the run."""
    runner.register_hook(StopAfter(iteration, number))
    with pytest.raises(SystemExit) as end:
        runner.train()
    assert end.value.code == STOPPED


def numbers(work_dir: Path) -> list[int]:
    return sorted(int(path.stem.split("_")[1]) for path in work_dir.glob("iter_*.pth"))


def state(work_dir: Path, iteration: int) -> dict[str, Any]:
    return load_safely(work_dir / f"iter_{iteration}.pth")


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit, weights and optimizer state."""
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name
    for number, values in one["optimizer"]["state"].items():
        for name, tensor in values.items():
            assert torch.equal(tensor, other["optimizer"]["state"][number][name]), name
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]


def logged(work_dir: Path, field: str) -> list[float]:
    """Over all runs in a work dir, in order."""
    lines = []
    for log in sorted(work_dir.glob("*/vis_data/scalars.json"), key=lambda p: p.stat().st_mtime):
        lines += [json.loads(line) for line in log.read_text().splitlines()]
    return [line[field] for line in lines]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rows that were trained on, one for each time, packs that only fill steps left out."""
    rows: list[str] = []
    run_iter = PolarTrainLoop.run_iter

    def watched(self: Any, batch: Any) -> None:
        if batch["data"]["pair_weights_P"].any():
            rows.extend(batch["data_samples"]["rows"])
        run_iter(self, batch)

    monkeypatch.setattr(PolarTrainLoop, "run_iter", watched)
    return rows


# ---- Stopped and gone on


@pytest.mark.parametrize(
    ("counts", "stops"), [(1, [3]), (1, [2, 5]), (2, [3]), (4, [1, 6])], ids=str
)
def test_a_run_that_is_stopped_and_resumed_is_the_unbroken_run(
    counts: int, stops: list[int], make: Any, tmp_path: Path
) -> None:
    options = {"accumulative_counts": counts, "log_interval": counts, "save_steps": 1000 * counts}
    make(12, work_dir=tmp_path / "unbroken", **options).train()
    broken = tmp_path / "broken"
    for place in stops:
        stop(make(12, work_dir=broken, resume=True, **options), place)
        assert numbers(broken)[-1] == -(-place // counts) * counts, "the step in flight ends"
    make(12, work_dir=broken, resume=True, **options).train()
    assert_same(state(tmp_path / "unbroken", 12), state(broken, 12))
    for field in ("loss", "lr", "pairs", "grad_norm"):
        assert logged(broken, field) == logged(tmp_path / "unbroken", field)


def test_a_run_goes_on_from_a_named_checkpoint_in_another_work_dir(
    make: Any, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    make(8, work_dir=first, save_steps=4).train()
    make(8, work_dir=second, resume=True, load_from=str(first / "iter_4.pth")).train()
    assert numbers(first) == [4, 8]
    assert numbers(second) == [8]
    assert_same(state(first, 8), state(second, 8))


def test_a_run_of_two_epochs_goes_on_in_the_second(
    make: Any, tmp_path: Path, seen: list[str]
) -> None:
    options = {"max_epochs": 2, "max_packed_length": 4096}
    unbroken = make(None, work_dir=tmp_path / "unbroken", **options)
    unbroken.train()
    rows, end = seen[:], unbroken.max_iters
    seen.clear()
    stop(make(None, work_dir=tmp_path / "broken", **options), end - 2)
    make(None, work_dir=tmp_path / "broken", resume=True, **options).train()
    assert seen == rows
    assert_same(state(tmp_path / "unbroken", end), state(tmp_path / "broken", end))


def test_a_signal_while_a_checkpoint_is_written_leaves_a_whole_one(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = torch.save

    def interrupted(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(*args, **kwargs)

    runner = make(8, work_dir=tmp_path / "run", save_steps=3)
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(SystemExit) as end:
        runner.train()
    assert end.value.code == STOPPED
    assert numbers(tmp_path / "run") == [3]
    checkpoint.check_checkpoint(tmp_path / "run" / "iter_3.pth")


def test_a_run_that_ends_by_itself_is_not_called_stopped(make: Any, tmp_path: Path) -> None:
    runner = make(4, work_dir=tmp_path / "run")
    runner.register_hook(StopAfter(4))
    runner.train()
    assert numbers(tmp_path / "run") == [4]


def test_what_is_done_is_not_done_again(make: Any, tmp_path: Path, seen: list[str]) -> None:
    make(4, work_dir=tmp_path / "run").train()
    seen.clear()
    make(4, work_dir=tmp_path / "run", resume=True).train()
    assert not seen
    assert numbers(tmp_path / "run") == [4]


def test_the_learning_rate_follows_the_config_of_the_resumed_run(make: Any, tmp_path: Path) -> None:
    options = {"log_interval": 1}
    make(12, work_dir=tmp_path / "unbroken", **options).train()
    stop(make(12, work_dir=tmp_path / "run", **options), 4)
    make(12, work_dir=tmp_path / "run", resume=True, lr=5e-4, **options).train()
    whole, halved = logged(tmp_path / "unbroken", "lr"), logged(tmp_path / "run", "lr")
    assert halved[:4] == whole[:4]
    assert halved[4:] == pytest.approx([rate / 2 for rate in whole[4:]])


def test_a_second_interruption_after_a_change_does_not_move_the_learning_rate(
    make: Any, tmp_path: Path
) -> None:
    for name, stops in (("once", []), ("twice", [14])):
        options = {"work_dir": tmp_path / name, "log_interval": 1, "save_steps": 1200}
        stop(make(None, **options), 8)
        options.update(accumulative_counts=2, resume=True)
        for place in [*stops]:
            stop(make(None, **options), 2 * place)
        make(None, **options).train()
    assert logged(tmp_path / "twice", "lr") == logged(tmp_path / "once", "lr")


def test_a_seed_that_nobody_has_chosen_is_the_checkpoints(make: Any, tmp_path: Path) -> None:
    options = {"work_dir": tmp_path / "run", "randomness": {"seed": None}}
    make(2, **options).train()
    make(4, resume=True, **options).train()
    assert numbers(tmp_path / "run") == [2, 4]


# ---- Another number of packs a step


def test_an_epoch_goes_on_with_another_accumulation_and_every_row_once(
    make: Any, tmp_path: Path, seen: list[str]
) -> None:
    """What other ranks change as well: how many packs make a step."""
    options = {"work_dir": tmp_path / "run", "log_interval": 1, "save_steps": 1200}
    stop(make(None, **options), 20)
    stop(make(None, accumulative_counts=2, resume=True, **options), 46)
    last = make(None, accumulative_counts=3, resume=True, **options)
    last.train()
    assert len(seen) == len(set(seen)) == 400
    assert last.iter == last.max_iters
    rates = logged(tmp_path / "run", "lr")
    falling = rates[rates.index(max(rates)) :]
    assert all(0 <= before - after < 0.15 * max(rates) for before, after in pairwise(falling))
    assert falling[-1] < 0.2 * max(rates)


# ---- Changed runs


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"randomness": {"seed": 7}}, ["seed: 42 in the checkpoint, 7 now"]),
        ({"max_packed_length": 600}, ["max_packed_length: 512 in the checkpoint, 600 now"]),
        ({"pairs_per_step": 4}, ["pairs_per_step: None in the checkpoint, 4 now"]),
        ({"max_length": 400}, ["max_length: 512 in the checkpoint, 400 now", "template: "]),
        ({"data_files": "other"}, ["data: ", "groups: "]),
        ({"group_candidates": False}, ["group_candidates: True in the checkpoint, False now"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_changed_run_is_refused_with_what_has_changed_unless_told_to(
    changes: dict[str, Any], named: list[str], make: Any, small: Path, tmp_path: Path
) -> None:
    work_dir = tmp_path / "run"
    make(2, work_dir=work_dir).train()
    if "data_files" in changes:
        rows = (small / "train.jsonl").read_text().splitlines()[:-9]
        (tmp_path / "other.jsonl").write_text("\n".join(rows))
        changes = {"data_files": str(tmp_path / "other.jsonl")}
    with pytest.raises(ValueError, match="cannot be gone on from") as error:
        make(4, work_dir=work_dir, resume=True, **changes).train()
    said = str(error.value).splitlines()[1:-1]
    assert len(said) == len(named)
    for start in named:
        assert any(line.strip().startswith(start) for line in said), said
    make(4, work_dir=work_dir, resume=True, resume_changed=True, **changes).train()
    assert numbers(work_dir) == [2, 4]


def test_weights_to_start_from_may_be_of_any_run(make: Any, tmp_path: Path) -> None:
    make(2, work_dir=tmp_path / "run").train()
    runner = make(2, load_from=str(tmp_path / "run" / "iter_2.pth"), max_packed_length=600)
    runner.train()
    assert runner.iter == 2


def test_a_checkpoint_of_an_older_version_is_resumed_with_a_warning(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(2, work_dir=tmp_path / "run").train()
    old = torch.load(tmp_path / "run" / "iter_2.pth")
    del old["message_hub"]["runtime_info"][resume.RECORD]
    torch.save(old, tmp_path / "run" / "iter_2.pth")
    make(4, work_dir=tmp_path / "run", resume=True).train()
    assert numbers(tmp_path / "run") == [2, 4]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"load_from": "http://a.b/iter_2.pth"}, "copy it to a folder first"),
        ({"default_hooks": {"checkpoint": {"by_epoch": True}}}, "epochs are no unit"),
        ({"default_hooks": {"checkpoint": {"out_dir": "s3://a"}}}, "not to s3://a"),
        ({"default_hooks": {"checkpoint": {"type": "CheckpointHook"}}}, "PolarCheckpointHook"),
        ({"train_cfg": {"time_limit": "soon"}}, "time_limit must be 'HH:MM:SS'"),
    ],
)
def test_what_could_lose_a_run_is_refused_at_its_start(
    options: dict[str, Any], reason: str, make: Any
) -> None:
    with pytest.raises(ValueError, match=reason):
        make(2, **options).train()


# ---- Damaged checkpoints and disks that fail


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(byte ^ 0xFF for byte in data[middle : middle + 64])
    path.write_bytes(data)


def test_a_run_resumes_from_the_newest_sound_checkpoint(
    make: Any, tmp_path: Path, seen: list[str]
) -> None:
    work_dir = tmp_path / "run"
    make(9, work_dir=work_dir, save_steps=3, save_total_limit=3).train()
    whole = state(work_dir, 9)["state_dict"]["llm.norm.weight"].clone()
    damage(work_dir / "iter_9.pth")
    os.truncate(work_dir / "iter_6.pth", 10_000)
    make(9, work_dir=work_dir, save_steps=3, save_total_limit=3, resume=True).train()
    assert torch.equal(state(work_dir, 9)["state_dict"]["llm.norm.weight"], whole)
    checkpoint.check_checkpoint(work_dir / "iter_6.pth")


def test_a_damaged_checkpoint_that_is_asked_for_is_named(make: Any, tmp_path: Path) -> None:
    make(2, work_dir=tmp_path / "run").train()
    path = tmp_path / "run" / "iter_2.pth"
    damage(path)
    for resumes in (True, False):
        with pytest.raises(CheckpointError, match=r"iter_2\.pth is damaged"):
            make(4, load_from=str(path), resume=resumes).train()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is sound"):
        make(4, work_dir=tmp_path / "run", resume=True).train()


def test_a_deepspeed_folder_is_not_resumed_without_deepspeed(make: Any, tmp_path: Path) -> None:
    make(2, work_dir=tmp_path / "run").train()
    folder = tmp_path / "iter_2.pth"
    folder.mkdir()
    shutil.copy(tmp_path / "run" / "iter_2.pth", folder / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="a folder, written with --deepspeed"):
        make(4, load_from=str(folder), resume=True).train()


def test_a_checkpoint_that_lacks_tensors_is_not_trained_from(make: Any, tmp_path: Path) -> None:
    make(2, work_dir=tmp_path / "run").train()
    lacking = torch.load(tmp_path / "run" / "iter_2.pth")
    del lacking["state_dict"]["llm.layers.1.attention.wo.weight"]
    torch.save(lacking, tmp_path / "lacking.pth")
    name = r"lacks 1 tensors of this model: llm\.layers\.1\.attention\.wo\.weight"
    with pytest.raises(ValueError, match=name):
        make(2, load_from=str(tmp_path / "lacking.pth")).train()


def test_weights_alone_are_not_resumed(make: Any, tmp_path: Path) -> None:
    make(2, work_dir=tmp_path / "run").train()
    state = torch.load(tmp_path / "run" / "iter_2.pth")
    del state["optimizer"]
    torch.save(state, tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match=r"best\.pth has weights alone.* no optimizer"):
        make(4, load_from=str(tmp_path / "best.pth"), resume=True).train()


def test_training_goes_on_when_a_disk_is_full_and_says_so_at_the_end(
    make: Any, small_disk: Path, tmp_path: Path
) -> None:
    runner = make(8, work_dir=small_disk, save_steps=2, save_total_limit=1)

    class FillDisk(Hook):
        def after_train_iter(self, runner: Any, batch_idx: int, **kwargs: Any) -> None:
            if runner.iter + 1 == 3:
                free = shutil.disk_usage(small_disk).free
                (small_disk / "filler").write_bytes(bytes(free - 100_000))

    runner.register_hook(FillDisk())
    with pytest.raises(CheckpointError, match=r"iter_8\.pth could not be written: .*No space"):
        runner.train()
    assert runner.iter == 8
    assert numbers(small_disk) == [2]
    assert not [*small_disk.glob(".iter*")]
    (small_disk / "filler").unlink()
    make(8, work_dir=small_disk, save_steps=2, save_total_limit=1, resume=True).train()
    assert numbers(small_disk) == [8]
