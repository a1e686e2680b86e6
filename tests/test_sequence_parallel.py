"""Sequence parallelism changes nothing: rewards, loss and gradients are those of one process.

Real processes over gloo, with xtuner's own set-up and exchange. Four of them make two groups of two
with packs of their own, then one group of four.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from commands import FORKS, TINY, run_ranks
from host_reads import host_reads
from test_attention import emulated_flash_attn
from test_shared_prefix import PlainGroup, collated, random_group, reward_model

from polar_xtuner import attention, sequence_parallel
from polar_xtuner.reward_model import PolarRewardModel
from polar_xtuner.sequence_parallel import (
    check_heads,
    data_parallel_rank,
    data_parallel_size,
    own_slice,
    sequence_parallel_size,
)

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

WORLD = 4
SIZES = (2, 4)


def parallel_model(checkpointing: bool = False, kv_heads: int = 4) -> PolarRewardModel:
    return reward_model(checkpointing, heads=8, kv_heads=kv_heads)


@dataclass
class Case:
    """The packs that two data-parallel ranks compute in one optimizer step."""

    packs: list[list[PlainGroup]]
    checkpointing: bool = False

    def of(self, groups: int) -> Case:
        """The same for so many data-parallel ranks."""
        return replace(self, packs=self.packs[:groups])

    @property
    def data(self) -> list[dict[str, Any]]:
        """With the weights that the plan gives them: packs / pairs of all packs."""
        pairs = sum(len(group.pairs) for pack in self.packs for group in pack)
        return [collated(pack, len(self.packs) / pairs) for pack in self.packs]


def random_pack(seed: int, tokens_modulo_four: int) -> list[PlainGroup]:
    """Groups that share prefixes, of 4 n + `tokens_modulo_four` tokens."""
    rng = np.random.default_rng(seed)
    while True:
        pack = [random_group(rng) for _ in range(4)]
        tokens = sum(len(group.laid_out().tokens) for group in pack)
        if tokens % 4 == tokens_modulo_four and all(group.pairs for group in pack):
            return pack


def late_rewards(prefix: int) -> list[PlainGroup]:
    """The reward rows are the last two tokens of the pack."""
    ids = [1 + i % 30 for i in range(prefix)]
    return [PlainGroup([[*ids, 39], [*ids, 38]], [(0, 1, 0.0)])]


CASES = {
    "no padding": Case([random_pack(0, 0), random_pack(1, 0)]),
    "odd": Case([random_pack(2, 1), random_pack(3, 3)]),
    "odd, checkpointed": Case([random_pack(4, 3), random_pack(5, 1)], checkpointing=True),
    "even, checkpointed": Case([random_pack(6, 2), random_pack(7, 2)], checkpointing=True),
    "reward rows in one slice": Case([late_rewards(20), late_rewards(21)]),
    "a slice of padding": Case([late_rewards(3), late_rewards(3)], checkpointing=True),
}


@dataclass
class Result:
    """Of one pack for each data-parallel rank; the gradients are the mean over all ranks."""

    rewards: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


# ---- In the processes


def go_backward(model: PolarRewardModel, pack: dict[str, Any], result: Result) -> None:
    with torch.no_grad():
        result.rewards.append(model(pack))
    loss = model(pack, mode="loss")["loss"]
    loss.backward()
    result.losses.append(loss.detach())


def computed(case: Case) -> Result:
    """What a process makes of its pack; what one process makes of them all, if it is alone."""
    model, result = parallel_model(case.checkpointing), Result()
    ranks = data_parallel_size()
    if dist.is_initialized():
        go_backward(model, case.data[data_parallel_rank() % len(case.packs)], result)
    else:
        ranks = len(case.packs)
        for pack in case.data:
            go_backward(model, pack, result)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if dist.is_initialized():  # every engine averages over all ranks
            dist.all_reduce(gradient)
            ranks = dist.get_world_size()
        result.gradients[name] = gradient / ranks
    return result


def refusal(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


def different_packs() -> str:
    pack = CASES["odd"].data[0]
    pack["input_ids_T"][dist.get_rank() % 2] += 1
    return refusal(parallel_model(), pack)


def through_flash_attn() -> tuple[Result, tuple[int, ...]]:
    """The odd case by a stand-in for flash-attn's kernel, and the shape it was checked with."""
    module, shape = ModuleType("flash_attn"), []

    def check(function: Any, device: Any, dtype: Any, *heads: int) -> float:
        shape.extend(heads)
        return 0.0

    module.flash_attn_varlen_func = emulated_flash_attn()  # type: ignore[attr-defined]
    replaced = {"check_backend": check, "_why_no_flash": lambda device, dtype: ""}
    with (
        mock.patch.dict(sys.modules, flash_attn=module),
        mock.patch.multiple(attention, **replaced),
    ):
        return computed(CASES["odd"]), tuple(shape)


def reads_after_the_first_pack() -> int:
    model, pack = parallel_model(), CASES["odd"].data[0]
    model(pack, mode="loss")["loss"].backward()
    with host_reads() as reads:
        model(pack, mode="loss")["loss"].backward()
    return reads.count


def facts() -> tuple[int, int, int]:
    return sequence_parallel_size(), data_parallel_size(), data_parallel_rank()


def process(rank: int, folder: Path) -> None:
    """One of `WORLD` processes: everything, for every size, in a file of its own."""
    from xtuner.parallel.sequence import init_sequence_parallel, setup_distributed

    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    found: dict[Any, Any] = {"before": facts()}
    for size in SIZES:
        setup_distributed._SEQUENCE_PARALLEL_GROUP = None  # xtuner lets it be set up once
        setup_distributed._DATA_PARALLEL_GROUP = None
        init_sequence_parallel(size)
        found[size] = {
            "facts": facts(),
            "slice": own_slice(torch.arange(1, 6)),
            "heads": refusal(parallel_model(kv_heads=1), CASES["odd"].data[0]),
            "packs": different_packs(),
            "reads": reads_after_the_first_pack(),
            "results": {name: computed(case.of(WORLD // size)) for name, case in CASES.items()},
        }
        if size == 2:
            found["flash"] = through_flash_attn()
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# ---- What is tested


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    running = [FORKS.Process(target=process, args=(rank, folder)) for rank in range(WORLD)]
    for one in running:
        one.start()
    for one in running:
        one.join(120)
        if one.is_alive():
            one.kill()
    assert [one.exitcode for one in running] == [0] * WORLD
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def assert_as_one_process(results: Sequence[Result], truth: Result, size: int) -> None:
    errors = {}
    for rank, ours in enumerate(results):
        pack = rank // size
        errors[rank, "rewards"] = off_by(ours.rewards[0], truth.rewards[pack])
        errors[rank, "loss"] = off_by(ours.losses[0], truth.losses[pack])
        assert ours.gradients.keys() == truth.gradients.keys()
        for name, gradient in truth.gradients.items():
            errors[rank, name] = off_by(ours.gradients[name], gradient)
    worst = max(errors, key=lambda what: errors[what])
    print(f"largest relative error: {errors[worst]:.1e}, of {worst}")
    assert max(errors.values()) <= 1e-12, (worst, errors[worst])


def off_by(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_a_group_has_the_rewards_loss_and_gradients_of_one_process(
    processes: list[dict[Any, Any]], name: str, size: int
) -> None:
    results = [found[size]["results"][name] for found in processes]
    assert_as_one_process(results, computed(CASES[name].of(WORLD // size)), size)


def test_flash_attn_runs_on_a_share_of_the_heads(processes: list[dict[Any, Any]]) -> None:
    results, shapes = zip(*(found["flash"] for found in processes), strict=True)
    assert set(shapes) == {(4, 2, 4)}, "it is checked on the heads that it will get"
    assert_as_one_process(results, computed(CASES["odd"]), 2)


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_of_a_group_has_the_same_rewards_and_loss(
    processes: list[dict[Any, Any]], size: int
) -> None:
    for name in CASES:
        results = [found[size]["results"][name] for found in processes]
        for rank, result in enumerate(results):
            first = results[rank // size * size]
            assert torch.equal(result.rewards[0], first.rewards[0])
            assert torch.equal(result.losses[0], first.losses[0])


def test_the_cases_are_what_they_say() -> None:
    tokens = {name: [len(d["input_ids_T"]) for d in case.data] for name, case in CASES.items()}
    assert {n % 2 for n in tokens["odd"]} == {1}
    assert {n % 4 for n in tokens["no padding"]} == {0}
    assert tokens["a slice of padding"] == [5, 5]  # two to a slice of four ranks
    for data in CASES["reward rows in one slice"].data:
        assert (data["reward_rows_C"] > len(data["input_ids_T"]) * 3 / 4).all()
    for name in ("no padding", "odd"):
        layout = CASES[name].data[0]["layout"]
        assert layout["query_lengths"] != layout["key_lengths"], "prefixes are shared"


def test_ranks_count_packs_by_groups(processes: list[dict[Any, Any]]) -> None:
    assert [found["before"] for found in processes] == [(1, WORLD, rank) for rank in range(WORLD)]
    for size in SIZES:
        expected = [(size, WORLD // size, rank // size) for rank in range(WORLD)]
        assert [found[size]["facts"] for found in processes] == expected


def test_without_processes_there_is_one_pack() -> None:
    assert facts() == (1, 1, 0)


def test_slices_are_contiguous_and_padded_at_the_end(processes: list[dict[Any, Any]]) -> None:
    for size, slices in ((2, [[1, 2, 3], [4, 5, 0]]), (4, [[1, 2], [3, 4], [5, 0], [0, 0]])):
        ours = [found[size]["slice"].tolist() for found in processes]
        assert ours == slices * (WORLD // size)


def test_heads_that_the_ranks_cannot_divide_are_refused(processes: list[dict[Any, Any]]) -> None:
    for found in processes:
        for size in SIZES:
            message = found[size]["heads"]
            assert message.startswith(f"sequence_parallel_size={size} does not divide the 1 KV")
            assert message.endswith("set sequence_parallel_size to one of 1")


def test_the_refusal_names_the_sizes_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_parallel, "sequence_parallel_size", lambda: 8)
    check_heads(32, 8)
    with pytest.raises(
        ValueError, match=r"=8 does not divide the 12 KV .* one of 1, 2, 3, 4, 6, 12"
    ):
        check_heads(24, 12)


def test_ranks_of_a_group_with_different_packs_are_refused(
    processes: list[dict[Any, Any]],
) -> None:
    for found in processes:
        for size in SIZES:
            pattern = rf"the {size} ranks .* have different packs \(of \d+, \d+"
            assert re.match(pattern, found[size]["packs"])


def test_no_rank_waits_for_its_device_after_the_first_pack(processes: list[dict[Any, Any]]) -> None:
    assert [found[size]["reads"] for found in processes for size in SIZES] == [0] * WORLD * 2


# ---- Training

TRAIN = """
from xtuner.tools import train

train.check_cfg = lambda cfg, args: None  # it demands flash_attn, which needs a GPU
train.main()
"""


def losses_and_gradient_norms(folder: Path, processes: int) -> list[list[float]]:
    """Of some steps with DeepSpeed, where all processes share a pack."""
    work_dir = folder / str(processes)
    zero2 = {
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 2},
    }
    (folder / "zero2.json").write_text(json.dumps(zero2))
    (folder / "train.py").write_text(TRAIN)
    (folder / "config.py").write_text(
        f"_base_ = {str(TINY)!r}\n"
        f"sequence_parallel_size = {processes}\n"
        "train_cfg = dict(max_epochs=None, max_iters=8)\n"
    )
    ranks = run_ranks(
        *(processes, folder / "train.py", folder / "config.py"),
        *("--launcher", "pytorch", "--deepspeed", folder / "zero2.json", "--work-dir", work_dir),
        *("--cfg-options", f"pretrained_model_name_or_path={folder / 'base'}", "log_interval=1"),
        *(f"data_files={folder / 'train.jsonl'}", f"cache_dir={folder / 'cache'}"),
        *("use_activation_checkpointing=True", "accumulative_counts=2"),
        OMP_NUM_THREADS="1",
    )
    assert (work_dir / "last_checkpoint").exists(), ranks[0]
    (log,) = work_dir.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    fields = ("loss", "pairs", "chosen_reward_std", "grad_norm")
    return [[line[name] for line in lines if name in line] for name in fields]


def test_two_processes_that_share_a_pack_train_as_one_does(tmp_path: Path, demo: Any) -> None:
    demo.write_data(tmp_path, train=200, held_out=1, seed=0)
    demo.write_base(tmp_path / "base", demo.build_tokenizer(), seed=0)
    one, two = (losses_and_gradient_norms(tmp_path, n) for n in (1, 2))
    assert len(one[0]) == 8
    for alone, shared in zip(one, two):
        assert shared == pytest.approx(alone, rel=1e-5, abs=1e-7)  # float32
