"""The training loop in one process: what it waits for, what it logs, where it stops."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_reads import host_reads
from mmengine.hooks import CheckpointHook

from polar_xtuner import checks, engine, metrics
from polar_xtuner.checks import shape_of
from polar_xtuner.engine import NonFiniteError, PolarTrainLoop
from polar_xtuner.packing import ModelShape
from polar_xtuner.reward_model import PolarRewardModel

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

SGD = {"_delete_": True, "type": "SGD", "lr": 0.01}
"""AdamW on a CPU reads its count of steps, which is on the host on a GPU as well."""


def logged(runner: Any) -> list[dict[str, float]]:
    (file,) = Path(runner.work_dir).glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text().splitlines()]


def saved(runner: Any) -> list[str]:
    return sorted(path.name for path in Path(runner.work_dir).glob("*.pth"))


# ---- What an iteration waits for


@pytest.mark.parametrize("counts", [1, 2])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_nothing_is_read_from_the_device_between_two_log_lines(
    counts: int, dtype: str | None, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads_of: list[int] = []
    run_iter = PolarTrainLoop.run_iter

    def counted(self: PolarTrainLoop, batch: Any) -> None:
        # `numpy` is how the loop reads the pack, which is still on the host.
        with host_reads(copies=("tolist", "cpu")) as reads:
            run_iter(self, batch)
        reads_of.append(reads.count)

    monkeypatch.setattr(PolarTrainLoop, "run_iter", counted)
    runner = make(
        12,
        {"optimizer": SGD},
        log_interval=4,
        accumulative_counts=counts,
        autocast_dtype=dtype,
        use_activation_checkpointing=True,
    )
    runner._hooks = [h for h in runner.hooks if not isinstance(h, CheckpointHook)]
    runner.train()
    # The first iteration chooses the attention backend; a line takes one transfer.
    assert reads_of[1:] == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_a_read_within_the_step_would_be_seen() -> None:
    x = torch.ones(3)
    with host_reads() as reads:
        for read in (float, bool, int):
            read(x[0])
        x[0].item(), x.tolist(), x.cpu(), x.nonzero(), x[x > 0], torch.equal(x, x)
        assert reads.count == 9
        x[torch.tensor([0, 1])], x.sum(), x.double()
        assert reads.count == 9


# ---- What it logs


def test_a_log_line_is_of_its_whole_interval(make: Any) -> None:
    every, some = make(10, log_interval=1), make(10, log_interval=4)
    every.train()
    some.train()
    lines, intervals = logged(every), logged(some)
    assert [line["step"] for line in intervals] == [4, 8]
    for end, interval in zip((4, 8), intervals):
        part = lines[end - 4 : end]
        pairs = sum(line["pairs"] for line in part)
        assert interval["pairs"] == pairs
        for name in ("loss", "grad_norm", "pack_fill"):  # of iterations and of packs
            mean = sum(line[name] for line in part) / 4
            assert interval[name] == pytest.approx(mean, rel=1e-6), name
        for name in ("accuracy", "ties", "margin", "chosen_reward", "rejected_reward"):
            mean = sum(line[name] * line["pairs"] for line in part) / pairs
            assert interval[name] == pytest.approx(mean, rel=1e-6, abs=1e-9), name
        for name in ("chosen_reward", "rejected_reward"):
            square = sum((x[f"{name}_std"] ** 2 + x[name] ** 2) * x["pairs"] for x in part) / pairs
            deviation = (square - interval[name] ** 2) ** 0.5
            assert interval[f"{name}_std"] == pytest.approx(deviation, rel=1e-5)
        assert interval["lr"] == part[-1]["lr"]
        assert 1 < interval["share_ratio"] < 3
        assert interval["tokens_per_s"] > 0
        assert interval["tokens_saved_per_s"] == pytest.approx(
            (interval["share_ratio"] - 1) * interval["tokens_per_s"]
        )
        assert interval["pairs_per_s"] * interval["time"] * 4 == pytest.approx(pairs)
        assert 0 < interval["data_time"] < interval["time"]
    # `time` is of the last interval, not of mmengine's last ten entries.
    assert intervals[0]["time"] != intervals[1]["time"]


def test_the_last_iterations_of_an_epoch_are_logged(make: Any) -> None:
    runner = make(1, log_interval=1000)
    runner.cfg.train_cfg = {"type": "PolarTrainLoop", "max_epochs": 1}
    runner._train_loop = runner.cfg.train_cfg
    runner.train()
    (line,) = logged(runner)
    assert line["step"] == runner.max_iters
    assert line["pairs"] == 400


def test_time_leaves_out_what_is_not_training(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    for module in (engine, metrics):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def slow(self: Any, runner: Any) -> None:
        clock.now += 1000

    step = PolarRewardModel.train_step

    def tick(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.now += 2
        return step(self, *args, **kwargs)

    monkeypatch.setattr(CheckpointHook, "_save_checkpoint", slow)
    monkeypatch.setattr(PolarRewardModel, "train_step", tick)
    runner = make(12, log_interval=4, save_steps=3)
    runner.train()
    assert [line["time"] for line in logged(runner)] == [2, 2, 2]


# ---- What is not finite


def break_at(iteration: int, monkeypatch: pytest.MonkeyPatch, what: str, counts: int = 1) -> None:
    """Make the loss or the gradient of an iteration infinite."""
    losses, done = PolarRewardModel._losses, []

    def broken(self: Any, *args: Any) -> Any:
        result = losses(self, *args)
        if len(done) == iteration and what == "loss":
            result["loss"] = result["loss"] * float("inf")
        if len(done) == iteration and what == "gradient":
            result["loss"].register_hook(lambda grad: grad * float("inf"))
        done.append(iteration)
        return result

    monkeypatch.setattr(PolarRewardModel, "_losses", broken)


def rows_of(runner: Any, first: int, last: int) -> list[str]:
    loader = runner.train_loop.dataloader
    (part,) = loader.sampler.parts(0)
    packs = [part.plan.pack(iteration, 0) for iteration in range(first, last)]
    return [row for pack in packs for row in loader.dataset[pack]["rows"]]


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("log_interval", "save_steps", "stop"),
    [(4, 1000, 7), (1000, 6, 5), (1000, 1000, 9), (1, 1000, 5)],
    ids=["log line", "checkpoint", "end", "every iteration"],
)
def test_the_run_stops_at_the_next_check_and_names_the_rows_of_the_first_bad_step(
    what: str,
    log_interval: int,
    save_steps: int,
    stop: int,
    make: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_at(5, monkeypatch, what)
    runner = make(10, log_interval=log_interval, save_steps=save_steps)
    place = "on this rank" if what == "loss" else "over all ranks"
    with pytest.raises(NonFiniteError, match=f"the {what} of iteration 5 .* {place}") as error:
        runner.train()
    assert runner.iter == stop
    assert f"stops at iteration {stop}," in str(error.value)
    assert str(error.value).endswith(": " + ", ".join(rows_of(runner, 5, 6)))
    assert not saved(runner)


def test_all_packs_of_a_broken_optimizer_step_are_named(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(5, monkeypatch, "loss")
    runner = make(8, log_interval=5, accumulative_counts=4)  # a check within the step
    with pytest.raises(NonFiniteError, match="iteration 5") as error:
        runner.train()
    assert str(error.value).endswith(": " + ", ".join(rows_of(runner, 4, 8)))


def test_a_run_that_a_hook_ends_early_is_checked_to_its_end(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(5, monkeypatch, "loss")
    runner = make(10, log_interval=1000)
    step = PolarRewardModel.train_step

    def stops(self: Any, *args: Any, **kwargs: Any) -> Any:
        runner.train_loop.stop_training = runner.iter == 6
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PolarRewardModel, "train_step", stops)
    with pytest.raises(NonFiniteError, match="iteration 5"):
        runner.train()


def test_clipping_that_raises_by_itself_is_told_in_the_same_words(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(5, monkeypatch, "gradient")
    for wrapper in ("OptimWrapper", "PolarOptimWrapper"):
        clip = {"max_norm": 1.0, "error_if_nonfinite": True}
        options = {"type": wrapper, "clip_grad": clip}
        runner = make(10, options, log_interval=4)
        if wrapper == "OptimWrapper":
            del runner.optim_wrapper["dtype"]
        with pytest.raises(NonFiniteError, match="the gradient of iteration 5") as error:
            runner.train()
        assert str(error.value).endswith(": " + ", ".join(rows_of(runner, 5, 6)))
        monkeypatch.undo()
        break_at(5, monkeypatch, "gradient")


# ---- What it is told


def test_half_precision_weights_without_a_float32_copy_are_refused(make: Any) -> None:
    runner = make(2)
    runner.model.bfloat16()
    with pytest.raises(ValueError, match=r"trained weights are .*bfloat16 without a float32"):
        runner.train()


def test_the_sampler_knows_the_shape_of_the_model(make: Any) -> None:
    runner = make(2)
    loop = runner.build_train_loop(runner._train_loop)
    assert loop.dataloader.sampler.model_shape == ModelShape(2, 32, 64, 4, 2)


def test_the_shape_of_a_model_that_is_not_built_yet_is_that_of_its_config(make: Any) -> None:
    model = make(2).cfg.model
    assert shape_of(model) == ModelShape(2, 32, 64, 4, 2)
    model.llm.num_hidden_layers = 1
    assert shape_of(model) == ModelShape(1, 32, 64, 4, 2)


def test_data_that_cannot_be_planned_are_told_of_before_the_model_is_loaded(
    make: Any, small: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for part in (small / "base").iterdir():
        if part.suffix != ".bin":  # a model that cannot be loaded
            (base / part.name).write_bytes(part.read_bytes())
    with pytest.raises(
        ValueError, match="400 groups cannot fill one optimizer step of 1 ranks x 500"
    ):
        make(500, accumulative_counts=500, pretrained_model_name_or_path=str(base))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"llm": {"max_position_embeddings": 256}}}, "more than the 256 positions"),
        (
            {"train_dataloader": {"sampler": {"accumulative_counts": 3}}},
            "the sampler plans for 3",
        ),
        ({"accumulative_counts": 3}, "would split an optimizer step of 3"),
        ({"reward_token_id": 100000}, "the model's vocabulary has"),
        ({"attention": "flash_attn"}, "flash-attn needs CUDA"),
        ({"max_packed_length": 40}, "do not fit a pack of max_packed_length=40"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused_with_the_reason(
    options: dict[str, Any], message: str, make: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        make(None, save_steps=10, **options).train()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_accumulation_steps", 4),
        ("train_micro_batch_size_per_gpu", 2),
        ("gradient_clipping", 0.5),
    ],
)
def test_a_deepspeed_file_that_disagrees_with_the_config_is_refused(name: str, value: Any) -> None:
    config = {
        "gradient_accumulation_steps": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
    }
    checks._check_deepspeed(config, {name: "auto"})
    checks._check_deepspeed(config, dict(config))
    with pytest.raises(ValueError, match=f"file has {name}={value}, the config .*={config[name]}:"):
        checks._check_deepspeed(config, {**config, name: value})
