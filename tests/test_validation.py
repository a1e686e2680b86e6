"""Evaluation by the runner: its figures, and when it takes place."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import TINY
from hypothesis import given
from hypothesis import strategies as st

from polar_xtuner import engine, polar_metric, validation
from polar_xtuner.cache import PAIR
from polar_xtuner.checks import polar_model
from polar_xtuner.interruption import STOPPED
from polar_xtuner.polar_metric import MOST_SOURCES, PolarMetric
from polar_xtuner.records import read_rows
from polar_xtuner.sampler import EvaluationSampler
from polar_xtuner.template import Candidate
from polar_xtuner.val_log import table
from polar_xtuner.validation import precision

torch.set_num_threads(1)

META = {
    "files": ["a.jsonl", "b.jsonl", "c.jsonl"],
    "sets": ["first", "first", "second"],
    "sources": ["", "web", "books"],
}


@pytest.fixture(scope="module")
def rows(small: Path) -> Path:
    """Rows to validate on, of two files: several candidates a row, sources, some shared prompts."""
    folder = small / "val"
    folder.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in (small / "train.jsonl").read_text().splitlines()[:60]]
    for number, row in enumerate(lines):
        row["source"] = ["web", "books", None][number % 3]
        other = lines[(number + 7) % 60]["rejected"]
        if number % 4 == 0 and other != row["chosen"]:
            row["rejected"] = [row["rejected"], other]
        if number % 5 == 0:
            lines[number - 1]["prompt"] = row["prompt"]
            lines[number - 1]["reference"] = row["reference"]
    for name, part in (("a", lines[:25]), ("b", lines[25:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture
def validating(make: Callable[..., Any], rows: Path) -> Callable[..., Any]:
    def runner(**options: Any) -> Any:
        files = {"a": str(rows / "a.jsonl"), "b": str(rows / "b.jsonl")}
        return make(**{"val_data_files": files, "val_steps": 4, **options})

    return runner


def figures_of(runner: Any) -> list[dict[str, float]]:
    """What validations wrote to the log, in order."""
    logs = Path(runner.work_dir).glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return [line for line in lines if "val/accuracy" in line]


# ---- Figures


def plain_figures(margins: list[float]) -> dict[str, float]:
    """The figures that need margins alone, number by number."""
    n = len(margins)
    return {
        "pairs": n,
        "accuracy": sum(m > 0 for m in margins) / n,
        "ties": sum(m == 0 for m in margins) / n,
        "margin": sum(margins) / n,
        "loss": sum(math.log1p(math.exp(-abs(m))) + max(-m, 0) for m in margins) / n,
    }


def test_figures_are_those_of_scoring_each_candidate_by_itself(validating: Any, rows: Path) -> None:
    runner = validating(iterations=4)
    runner.train()
    (logged,) = figures_of(runner)

    model = polar_model(runner).eval()
    dataset = runner.val_loop.dataloader.dataset
    template = engine_template(runner)
    margins: dict[str, list[float]] = {}
    chosen_rewards = []
    for row in read_rows(sorted(rows.glob("*.jsonl"))):
        scores = {
            text: alone(model, template.encode([Candidate(row.prompt, row.reference, text)])[0])
            for text in (*row.chosen, *row.rejected)
        }
        name = Path(row.file).stem
        for c in row.chosen:
            for r in row.rejected:
                chosen_rewards.append(scores[c])
                for part in ("", f"{name}/", f"source/{row.source}/"):
                    margins.setdefault(part, []).append(scores[c] - scores[r])
    del margins["source/None/"]
    assert len(margins) == 5
    assert int(dataset.pair_counts.sum()) == len(margins[""]) > 60
    for part, values in margins.items():
        for name, value in plain_figures(values).items():
            assert logged[f"val/{part}{name}"] == pytest.approx(value, abs=2e-6), (part, name)
    assert logged["val/chosen_reward"] == pytest.approx(np.mean(chosen_rewards), abs=2e-6)
    assert logged["val/chosen_reward_std"] == pytest.approx(np.std(chosen_rewards), abs=2e-6)


def engine_template(runner: Any) -> Any:
    from polar_xtuner.template import PolarTemplate

    tokenizer = validation_tokenizer(runner)
    return PolarTemplate(tokenizer, 512, 128)


def validation_tokenizer(runner: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(runner.cfg.pretrained_model_name_or_path)


@torch.no_grad()
def alone(model: Any, ids: list[int]) -> float:
    from polar_xtuner.scoring import pack_of

    (reward,) = model(pack_of([(ids, [1, len(ids) - 1])]))
    return float(reward)


def some_pairs(count: int, seed: int) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(seed)
    pairs = np.zeros(count, PAIR)
    pairs["file"] = random.integers(0, 3, count)
    pairs["line"] = np.arange(count)
    pairs["source"] = random.integers(0, 3, count)
    pairs["chosen_length"], pairs["rejected_length"] = random.integers(0, 50, (2, count))
    return pairs, *random.normal(size=(2, count)).round(1)


def fill(metric: PolarMetric, pairs: Any, chosen: Any, rejected: Any, weight: float = 1.0) -> None:
    data = {"pair_weights_P": torch.full((len(pairs),), weight)}
    batch = {"data": data, "data_samples": {"pairs": pairs}}
    rewards = {"chosen": torch.tensor(chosen), "rejected": torch.tensor(rejected)}
    metric.process(batch, [rewards])


def metric(**options: Any) -> PolarMetric:
    made = PolarMetric(**options)
    made.dataset_meta = dict(META)
    return made


def same(a: dict[str, float], b: dict[str, float]) -> bool:
    return a.keys() == b.keys() and all(
        a[name] == b[name] or (math.isnan(a[name]) and math.isnan(b[name])) for name in a
    )


@given(
    count=st.integers(1, 40),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    twice=st.integers(0, 10),
)
def test_ranks_together_give_what_one_gives_whatever_was_computed_twice(
    count: int, ranks: int, seed: int, twice: int
) -> None:
    pairs, chosen, rejected = some_pairs(count, seed)
    one = metric(length_bias=True)
    fill(one, pairs, chosen, rejected)
    wanted = one.evaluate(count)
    random = np.random.default_rng(seed)
    order = random.permutation(np.append(np.arange(count), random.integers(0, count, twice)))
    shares = []
    for part in np.array_split(order, ranks):
        holder = metric()
        fill(holder, pairs[part], chosen[part], rejected[part])
        fill(holder, pairs[:1], chosen[:1] + 5, rejected[:1], weight=0.0)  # only fills a step
        shares.append(polar_metric._joined(holder.results))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polar_metric, "all_gather_object", lambda own: shares)
        assert same(metric(length_bias=True).evaluate(count), wanted)


def test_sets_and_sources_are_those_of_the_pairs_own_rows() -> None:
    pairs, chosen, rejected = some_pairs(200, 1)
    one = metric()
    fill(one, pairs, chosen, rejected)
    figures = one.evaluate(200)
    margins = chosen - rejected
    for part, mask in (
        ("first", pairs["file"] < 2),
        ("second", pairs["file"] == 2),
        ("source/web", pairs["source"] == 1),
        ("source/books", pairs["source"] == 2),
    ):
        for name, value in plain_figures(margins[mask].tolist()).items():
            assert figures[f"val/{part}/{name}"] == pytest.approx(value, rel=1e-12), (part, name)
    assert len(figures) == 5 * len([name for name in figures if name.count("/") == 1])


def test_its_names_are_known_before_there_is_a_pair() -> None:
    one = metric(length_bias=True)
    names = one.names()
    fill(one, *some_pairs(30, 0))
    assert names == [*one.evaluate(30)]


def test_many_sources_are_not_logged_one_by_one() -> None:
    one = metric()
    one.dataset_meta["sources"] = ["", *map(str, range(MOST_SOURCES + 1))]
    assert not any("source/" in name for name in one.names())


def test_a_reward_that_is_not_finite_names_its_row() -> None:
    pairs, chosen, rejected = some_pairs(9, 0)
    pairs["file"][4], rejected[4] = 2, math.nan
    one = metric()
    fill(one, pairs, chosen, rejected)
    with pytest.raises(ValueError, match=r"1 of 9 pairs .* c\.jsonl:4"):
        one.evaluate(9)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_scores_of_every_row_are_written_at_full_precision(ending: str, tmp_path: Path) -> None:
    pairs, chosen, rejected = some_pairs(8, 0)
    chosen = chosen + 1 / 3
    pairs["line"], pairs["file"] = [1, 1, 1, 1, 2, 2, 3, 4], [0, 0, 0, 0, 0, 0, 1, 2]
    pairs["chosen_index"] = [0, 0, 1, 1, 0, 0, 0, 0]
    pairs["rejected_index"] = [0, 1, 0, 1, 0, 1, 1, 0]
    chosen[:4], rejected[:4] = chosen[[0, 0, 2, 2]], rejected[[0, 1, 0, 1]]
    chosen[5] = chosen[4]
    one = metric(scores_file=str(tmp_path / "new" / f"{{iter}}.{ending}"))
    one.dataset_meta["iteration"] = 40
    order = np.random.default_rng(0).permutation(8)
    fill(one, pairs[order], chosen[order], rejected[order])
    one.evaluate(8)
    file = tmp_path / "new" / f"40.{ending}"
    if ending == "jsonl":
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        from pyarrow.parquet import read_table

        lines = read_table(file).to_pylist()
    assert [(line["file"], line["line"], line["set"]) for line in lines] == [
        ("a.jsonl", 1, "first"),
        ("a.jsonl", 2, "first"),
        ("b.jsonl", 3, "first"),
        ("c.jsonl", 4, "second"),
    ]
    assert lines[0]["chosen_scores"] == [chosen[0], chosen[2]]
    assert lines[0]["rejected_scores"] == [rejected[0], rejected[1]]
    assert lines[1]["rejected_scores"] == [rejected[4], rejected[5]]
    assert lines[2]["rejected_scores"] == [None, rejected[6]]  # the first was in no pair
    assert lines[3]["source"] == META["sources"][pairs["source"][7]]


def test_a_scores_file_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\.jsonl or \.parquet, got 'scores\.csv'"):
        PolarMetric(scores_file="scores.csv")


# ---- Packs


@given(groups=st.integers(1, 30), ranks=st.integers(1, 8))
def test_every_group_is_evaluated_once_and_ranks_keep_step(groups: int, ranks: int) -> None:
    random = np.random.default_rng(groups)
    data: Any = SimpleNamespace(
        lengths=random.integers(10, 60, groups),
        pair_counts=random.integers(1, 4, groups),
        max_packed_length=100,
    )
    seen: list[tuple[int, int]] = []
    lengths = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polar_xtuner.sampler.data_parallel_size", lambda: ranks)
        for rank in range(ranks):
            patch.setattr("polar_xtuner.sampler.data_parallel_rank", lambda rank=rank: rank)
            sampler = EvaluationSampler(data)
            packs = [*sampler]
            lengths.add(len(packs))
            assert len(packs) == len(sampler)
            seen += [
                (share.group, share.stop - share.start)
                for pack in packs
                if pack.pair_weight
                for share in pack.shares
            ]
    assert len(lengths) == 1
    assert sorted(seen) == [*enumerate(data.pair_counts)]


def test_what_validation_leaves_unsaid_is_as_in_training(validating: Any) -> None:
    runner = validating(iterations=4, max_length=300, max_response_length=90)
    training = runner.train_loop.dataloader
    loader = validation.build_evaluation(runner, "val", runner.cfg.val_dataloader)
    assert loader.dataset.max_length == training.dataset.max_length == 300
    assert loader.dataset.identity["template"] == training.dataset.identity["template"]
    assert loader.dataset.max_packed_length == training.dataset.max_packed_length
    assert loader.dataset.metainfo["sets"] == ["a", "b"]
    own = {"dataset": {"max_packed_length": 400}}
    assert validation.build_evaluation(runner, "val", own).dataset.max_packed_length == 400
    own["dataset"]["data_files"] = runner.cfg.val_data_files.a  # type: ignore[assignment]
    assert validation.build_evaluation(runner, "val", own).dataset.metainfo["sets"] == [""]
    assert validation.build_evaluation(runner, "test", {"dataset": {}}) is None  # there is no data


@pytest.mark.parametrize(
    ("wrapper", "dtype"),
    [
        ({"type": "PolarOptimWrapper", "dtype": "bfloat16"}, torch.bfloat16),
        ({"type": "PolarOptimWrapper", "dtype": None}, torch.float32),
        ({"type": "AmpOptimWrapper", "dtype": "bfloat16"}, torch.bfloat16),
        ({"type": "AmpOptimWrapper"}, torch.float16),
        (None, torch.float32),
    ],
)
def test_it_computes_in_the_precision_of_training(wrapper: Any, dtype: torch.dtype) -> None:
    runner = SimpleNamespace(cfg={"optim_wrapper": wrapper}, model=torch.nn.Linear(4, 4))
    with precision(runner):
        assert runner.model(torch.ones(1, 4)).dtype == dtype


# ---- When


def test_it_validates_at_intervals_and_at_the_end_and_training_goes_on_as_without(
    validating: Any, make: Any
) -> None:
    runner = validating(iterations=10)
    runner.train()
    lines = figures_of(runner)
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert len({line["val/loss"] for line in lines}) == 3
    assert runner.model.training
    plain = make(10)
    plain.train()
    assert all(
        torch.equal(a, b) for a, b in zip(runner.model.parameters(), plain.model.parameters())
    )
    assert not figures_of(plain)


def test_the_best_weights_are_kept_by_the_figure_that_is_asked_for(validating: Any) -> None:
    runner = validating(iterations=12, save_best="val/a/loss", lr=3e-3)
    runner.train()
    losses = {line["step"]: line["val/a/loss"] for line in figures_of(runner)}
    best = min(losses, key=lambda step: losses[step])
    kept = [path.name for path in Path(runner.work_dir).glob("best_*.pth")]
    assert kept == [f"best_val_a_loss_iter_{best}.pth"]


def test_a_scores_file_that_cannot_be_written_ends_no_run(
    validating: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[str] = []
    monkeypatch.setattr(
        polar_metric.logger, "error", lambda text, *args: errors.append(text % args)
    )
    (tmp_path / "file").touch()
    runner = validating(iterations=4, val_scores_file=str(tmp_path / "file" / "scores.jsonl"))
    runner.train()
    assert [error[:34] for error in errors] == ["the scores could not be written: ["]
    assert len(figures_of(runner)) == 1


@pytest.mark.parametrize("steps", [None, 9])
def test_it_may_validate_at_the_end_only(steps: int | None, validating: Any) -> None:
    runner = validating(iterations=8, val_steps=steps)
    runner.train()
    assert [line["step"] for line in figures_of(runner)] == [8]


@pytest.mark.parametrize(
    ("text", "sets"),
    [
        ("val_data_files = {a!r}", [""]),
        ("val_data_files = dict(x={a!r}, y=[{b!r}])", ["x", "y"]),
        ("val_dataloader = dict(dataset=dict(data_files=dict(z={b!r})))", ["z"]),
        ("", None),
    ],
)
def test_a_config_over_another_names_its_rows_as_that_one_does(
    text: str, sets: list[str] | None, make: Any, rows: Path, tmp_path: Path
) -> None:
    from mmengine.config import Config

    runner = make(4)
    names = {name: str(rows / f"{name}.jsonl") for name in "ab"}
    (tmp_path / "own.py").write_text(f"_base_ = {str(TINY)!r}\n{text.format(**names)}\n")
    config = Config.fromfile(str(tmp_path / "own.py"))
    runner.cfg.val_data_files = config.val_data_files
    loader = validation.build_evaluation(runner, "val", config.val_dataloader)
    assert (loader and loader.dataset.metainfo["sets"]) == sets
    if sets == ["x", "y"]:
        config.merge_from_dict({"val_data_files.y": names["a"], "val_data_files.x": names["b"]})
        runner.cfg.val_data_files = config.val_data_files
        loader = validation.build_evaluation(runner, "val", config.val_dataloader)
        assert loader.dataset.metainfo["files"] == [names["b"], names["a"]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "'' cannot be"),
        ("source/web", "must not begin with shuffled_references or source"),
        ("shuffled_references", "must not begin"),
    ],
)
def test_a_set_cannot_be_named_like_other_figures(name: Any, message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make(4, val_data_files={name: "a.jsonl"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_steps": 3, "accumulative_counts": 2}, "would split an optimizer step of 2"),
        ({"val_steps": 0}, "must be a whole number >= 1, or None"),
        ({"val_steps": 1.5}, "must be a whole number >= 1, or None"),
        ({"val_dataloader.dataset.max_length": 9999}, "more than the 2048 positions"),
        ({"save_best": "val/acuracy"}, "acuracy: whether more or less of it is better"),
        ({"save_best": "val/c/accuracy"}, "no such figure; it has .*val/a/accuracy"),
        ({"save_best": "accuracy"}, "no such figure"),
        ({"save_best": "val/accuracy", "val_data_files": None}, "set val_data_files"),
        ({"val_dataloader.persistent_workers": True, "val_dataloader.num_workers": 1}, "never end"),
        ({"val_dataloader.sampler.type": "PackSampler"}, "must be EvaluationSampler, got Pack"),
    ],
)
def test_what_does_not_fit_together_stops_the_run_at_its_start(
    options: dict[str, Any], message: str, validating: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        validating(iterations=4, **options).train()


def test_shuffled_references_are_evaluated_beside_the_true_ones(validating: Any) -> None:
    runner = validating(iterations=4, val_controls=True)
    runner.train()
    (logged,) = figures_of(runner)
    assert logged["val/shuffled_references/pairs"] == logged["val/pairs"]
    assert logged["val/shuffled_references/a/pairs"] == logged["val/a/pairs"]
    assert logged["val/shuffled_references/loss"] != logged["val/loss"]
    assert "val/score_length_correlation" in logged


def test_a_run_that_is_asked_to_stop_while_it_validates_stops_and_validates_when_resumed(
    validating: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runner = validating(iterations=8, val_steps=4, work_dir=tmp_path / "run")
    seen: list[int] = []

    class At(engine.Hook):
        def after_val_iter(self, runner: Any, batch_idx: int, **_: Any) -> None:
            seen.append(batch_idx)
            if batch_idx == 1:
                signal.raise_signal(signal.SIGUSR1)
                while not runner.train_loop.interruption.is_due():
                    pass

    runner.register_hook(At())
    with pytest.raises(SystemExit) as stopped:
        runner.train()
    assert stopped.value.code == STOPPED
    assert seen == [0, 1]
    assert (tmp_path / "run" / "iter_4.pth").exists()
    assert not figures_of(runner)
    resumed = validating(iterations=8, work_dir=tmp_path / "run", resume=True, custom_hooks=[])
    resumed.train()
    logs = sorted((tmp_path / "run").glob("*/vis_data/scalars.json"))
    lines = [json.loads(line) for line in logs[-1].read_text().splitlines()]
    assert [line["step"] for line in lines if "val/accuracy" in line] == [4, 8]


def test_another_validation_loop_is_refused(validating: Any) -> None:
    runner = validating(iterations=4)
    runner._val_loop = validation.PolarTestLoop(runner, [], runner.cfg.val_evaluator)
    with pytest.raises(ValueError, match=r"val_cfg\.type=PolarValLoop, got PolarTestLoop"):
        runner.train()


# ---- How it is logged


def test_a_table_has_a_line_for_all_pairs_and_for_each_part() -> None:
    figures = {
        "val/pairs": 1200,
        "val/accuracy": 0.9,
        "val/accuracy_low": 0.88,
        "val/accuracy_high": 0.92,
        "val/temperature": math.nan,
        "val/a/pairs": 200,
        "val/a/accuracy": 0.5,
        "val/a/loss": 0.7,
    }
    first, second = table(figures).splitlines()
    assert first.split() == "val 1,200 pairs accuracy 0.9000 [0.8800, 0.9200]".split()
    assert second.split() == "val/a 200 pairs accuracy 0.5000 loss 0.7000".split()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    lines: list[str] = []
    monkeypatch.setattr(engine.logger, "info", lambda text, *args: lines.append(text % args))
    yield lines


def test_a_run_says_what_will_happen_and_what_it_says_comes_true(
    validating: Any, said: list[str]
) -> None:
    runner = validating(iterations=10, save_steps=4, save_total_limit=-1, save_best="val/loss")
    runner.train()
    (text,) = (line for line in said if line.startswith("this run:"))
    lines = {line.split()[0]: line for line in text.splitlines()[1:]}
    data = runner.train_loop.dataloader.dataset
    assert f" {len(data.lengths):,} groups" in lines["data"]
    assert f" {data.lengths.sum():,} an epoch" in lines["tokens"]
    assert "10 (max_iters=10)" in lines["steps"]
    count = sum(p.numel() for p in runner.model.parameters())
    assert f"{count:,} trained of {count:,} (all weights)" in lines["parameters"]
    assert "float32 weights" in lines["precision"]
    assert "sdpa" in lines["attention"]
    assert " 3, every 4 iterations" in lines["checkpoints"]
    assert len([*Path(runner.work_dir).glob("iter_*.pth")]) == 3
    assert (
        f" {figures_of(runner)[0]['val/pairs']:.0f} pairs in 2 sets (a, b)" in lines["validation"]
    )
