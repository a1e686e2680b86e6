"""DeepSpeed's state cut for other processes and stages is the state that was written."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import run_ranks
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from repartitioned import CHANGES, WEIGHTS
from zero_checkpoints import STEPS

from polar_xtuner.checkpoint import CheckpointError, load_meta
from polar_xtuner.repartition import part_of_zero2, part_of_zero3, prepare_resume
from polar_xtuner.zero_folder import ZeroFolder, join_zero2, join_zero3


def test_deepspeed_says_the_same_of_every_parameter(
    odd_config: Path, zero_checkpoints: Path
) -> None:
    script = Path(__file__).with_name("repartitioned.py")
    ranks = run_ranks(3, script, odd_config, zero_checkpoints, OMP_NUM_THREADS="1")
    for rank in ranks:
        assert rank.returncode == 0, rank.stderr
    for before, now in CHANGES:
        truth = torch.load(zero_checkpoints / f"{before}.truth")
        found = torch.load(zero_checkpoints / f"{before}-{now}.pth")
        assert (found["steps"], found["global_steps"]) == ({2 * STEPS}, STEPS)
        assert found["state"].keys() == truth.keys()
        assert all(values["exp_avg_sq"].any() for values in truth.values())
        for name, values in found["state"].items():
            computes_with = values.pop("computes with")
            for key, value in values.items():
                assert torch.equal(value, truth[name][key]), (before, now, name, key)
            assert torch.equal(computes_with, values["weight"].to(computes_with.dtype))
            start, end = truth[name]["weight"], truth[name]["trained"]
            way = (end - start).norm()
            tolerance = 0.1 if before == "bfloat16" else 1e-3
            assert (found["trained"][name] - end).norm() <= tolerance * way, (before, name)
    for before, now in WEIGHTS:
        truth = torch.load(zero_checkpoints / f"{before.removesuffix('.pth')}.truth")
        found = torch.load(zero_checkpoints / f"{before}-{now}.pth")
        assert found["steps"] == {STEPS}
        assert found["weights"].keys() == truth.keys()
        for name, weight in found["weights"].items():
            assert torch.equal(weight, truth[name]["weight"]), (before, now, name)


@hypothesis_settings(max_examples=50)
@given(
    sizes=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=5), min_size=1, max_size=3),
    before=st.tuples(st.sampled_from([2, 3]), st.integers(1, 7)),
    now=st.tuples(st.sampled_from([2, 3]), st.integers(1, 7)),
)
def test_any_sizes_processes_and_stages_keep_every_element(
    sizes: list[list[int]], before: tuple[int, int], now: tuple[int, int]
) -> None:
    numbers = iter(range(1, 10_000))
    groups = [
        {f"{number}.{place}": torch.tensor([next(numbers) for _ in range(size)], dtype=torch.float)}
        for number, of_group in enumerate(sizes)
        for place, size in enumerate(of_group)
    ]
    values: Any = groups
    for stage, ranks in (before, now):
        shapes = [
            {name: values[number][name].shape for name in group}
            for number, group in enumerate(groups)
        ]
        parameters = [[[tensor] for tensor in group.values()] for group in values]
        if stage == 3:
            cut_up = [[part_of_zero3(p, rank, ranks) for p in parameters] for rank in range(ranks)]
            joined = join_zero3(cut_up, shapes)
        else:
            totals = [sum(tensor.numel() for tensor in group.values()) for group in values]
            part = [-(-total // (2 * ranks)) * 2 for total in totals]
            cut_up = [
                [part_of_zero2(p, size, rank) for p, size in zip(parameters, part)]
                for rank in range(ranks)
            ]
            joined = join_zero2(cut_up, shapes)
        values = [{name: torch.cat(joined[name]) for name in group} for group in groups]
    for group, of_group in zip(groups, values):
        for name, tensor in group.items():
            assert torch.equal(of_group[name], tensor)


def strategy(stage: int, **zero: Any) -> Any:
    config = {"zero_optimization": {"stage": stage, **zero}} if stage else {}
    return SimpleNamespace(config=config, resume="DeepSpeed's own")


@pytest.mark.parametrize(
    ("name", "changes", "processes", "own"),
    [
        ("zero2", {}, 2, True),
        ("zero3", {}, 2, True),
        ("bfloat16", {}, 2, True),
        ("zero2", {}, 3, False),
        ("zero2", {"stage": 3}, 2, False),
        ("zero1", {"stage": 2}, 2, False),
        ("zero2", {"round_robin_gradients": True}, 2, False),
        ("zero3", {"sub_group_size": 5000}, 2, False),
        ("whole", {}, 7, True),
    ],
)
def test_deepspeed_loads_itself_what_it_can(
    name: str,
    changes: dict[str, Any],
    processes: int,
    own: bool,
    zero_checkpoints: Path,
    tmp_path: Path,
) -> None:
    folder = zero_checkpoints / name
    if name == "whole":
        folder = written(tmp_path, {"optimizer": {"state": {}}})
        for file in folder.glob("zero_*"):
            file.unlink()
    config = copy.deepcopy(load_meta(folder).get("ds_config", {}))
    config.get("zero_optimization", {}).update(changes)
    of_run = SimpleNamespace(config=config, resume="DeepSpeed's own")
    prepare_resume(of_run, folder, processes)
    assert (of_run.resume == "DeepSpeed's own") == own


def written(folder: Path, state: dict[str, Any]) -> Path:
    """A folder that two processes wrote, with nothing of value in it."""
    common = {"dp_world_size": 2, "meta": {"iter": 4}, "module": {}, "optimizer": None}
    torch.save({**common, **state}, folder / "mp_rank_00_model_states.pt")
    for rank in range(2):
        torch.save({}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


BF16_OPTIMIZER = strategy(1)
BF16_OPTIMIZER.config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (
            strategy(0),
            strategy(2),
            "at ZeRO stage 0, now there are 3 at stage 2, .*: only what ZeRO",
        ),
        (
            strategy(2),
            strategy(0),
            "at ZeRO stage 2, now there are 3 at stage 0, .*: only what ZeRO",
        ),
        (strategy(3), strategy(3, offload_param={"device": "nvme"}), "offloaded to NVMe cannot"),
        (strategy(3, mics_shard_size=2), strategy(3), "what MiCS cuts cannot be cut anew"),
        (strategy(2, elastic_checkpoint=True), strategy(2), "with elastic_checkpoint cannot be"),
        (strategy(2), BF16_OPTIMIZER, r"BF16_Optimizer holds \(grad_accum_dtype\) cannot be"),
    ],
)
def test_what_cannot_be_cut_anew_is_refused_before_the_model_is_built(
    before: Any, now: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=said):
        prepare_resume(now, written(tmp_path, {"ds_config": before.config}), 3)


def test_the_files_of_all_nodes_are_needed(tmp_path: Path) -> None:
    state = {"ds_config": {**strategy(2).config, "checkpoint": {"use_node_local_storage": True}}}
    folder = written(tmp_path, state)
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"lacks zero_pp_rank_1_.* of all nodes into one"):
        prepare_resume(strategy(2), folder, 3)


def test_a_folder_without_zero_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path} was written without ZeRO"):
        ZeroFolder(written(tmp_path, {"optimizer": {"state": {}}}))
