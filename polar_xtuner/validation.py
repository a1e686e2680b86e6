"""Evaluation by the runner: while a model trains, and by `xtuner test`.

Rows are packed and share their prefixes as in training, and are spread over all ranks. Every rank
sends the two rewards of each of its pairs to all others, so that figures are computed from the
pairs themselves: a mean over ranks or packs is never taken, and a pair counts once however often a
rank had to compute it to keep step with the others.

What a dataloader to evaluate with leaves unsaid is as in `train_dataloader`: tokenizer, template,
limits, packs. Its rows are in the config's `val_data_files` or `test_data_files`, unless it names
some itself; without any there is nothing to do.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, is_main_process
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import CheckpointHook
from mmengine.registry import LOOPS, METRICS
from mmengine.runner.base_loop import BaseLoop
from numpy.typing import NDArray

from polar_xtuner._checks import one_line
from polar_xtuner.cache import PAIR
from polar_xtuner.checkpoint import atomic_file
from polar_xtuner.checks import check_data, deepspeed_config, polar_model, unwrapped
from polar_xtuner.evaluation import PairScores, length_figures, pair_figures
from polar_xtuner.interruption import quieten
from polar_xtuner.optim import autocast_dtype
from polar_xtuner.sampler import EvaluationSampler

logger = logging.getLogger(__name__)

Figures = dict[str, float]

OWN = ("data_files", "dataset", "shuffled_references")
"""Arguments of a dataset that are never taken over from that of training."""

SHUFFLED = "shuffled_references"

MOST_SOURCES = 32
"""Sources whose figures are logged."""

PLACE = ("file", "line", "chosen_index", "rejected_index")
"""What tells a pair from all others."""


def build_evaluation(
    runner: Any, stage: str, given: Mapping[str, Any], *, shuffled_references: bool = False
) -> Any:
    """The dataloader of packs to evaluate; None if there is no data for it.

    Args:
        stage: `val` or `test`.
        given: the config; its `dataset` as well is completed by that of training.
        shuffled_references: see `PolarDataset`.

    Raises:
        ValueError: another sampler.
    """
    train, own = runner.cfg.get("train_dataloader") or {}, given.get("dataset") or {}
    if isinstance(own, Mapping):
        if not own.get("data_files") and own.get("dataset") is None:
            own = {**own, "data_files": runner.cfg.get(f"{stage}_data_files")}
            if not own["data_files"]:
                return None
        like = {k: v for k, v in (train.get("dataset") or {}).items() if k not in OWN}
        merged = Config({"dataset": like})
        merged.merge_from_dict({"dataset": own})
        own = {**merged.dataset, "shuffled_references": shuffled_references}
    config = {**train, "sampler": {"type": EvaluationSampler}, **given, "dataset": own}
    loader = runner.build_dataloader(config, seed=runner.seed)
    if not isinstance(loader.sampler, EvaluationSampler):
        raise ValueError(
            f"{stage}_dataloader.sampler must be EvaluationSampler, got "
            f"{type(loader.sampler).__name__}, which does not take every row once: leave it out"
        )
    quieten(loader, f"{stage}_dataloader")
    return loader


class _EvaluationLoop(BaseLoop):  # type: ignore[misc]
    """All packs of a dataloader through the model, in the precision of training.

    Args:
        dataloader: or its config (`build_evaluation`).
        evaluator: or its config, of `PolarMetric`.
        shuffled_references: also evaluate with the reference of another prompt for every row, as
            `<prefix>/shuffled_references/...`: a model that compares with references cannot do
            better than chance there.
    """

    stage: ClassVar[str]

    def __init__(
        self, runner: Any, dataloader: Any, evaluator: Any, shuffled_references: bool = False
    ) -> None:
        config = dataloader if isinstance(dataloader, Mapping) else None
        if config is not None:
            dataloader = build_evaluation(runner, self.stage, config)
        super().__init__(runner, dataloader)
        self.evaluator = _built(runner, evaluator)
        self._shuffled = None
        if shuffled_references and dataloader is not None:
            if config is None:
                raise ValueError(
                    f"{self.stage}_cfg.shuffled_references builds a dataset of its own: give "
                    f"{self.stage}_dataloader as a config"
                )
            self._shuffled = build_evaluation(runner, self.stage, config, shuffled_references=True)

    @property
    def is_polar(self) -> bool:
        """Whether all metrics are `PolarMetric`."""
        return all(isinstance(metric, PolarMetric) for metric in self.evaluator.metrics)

    def check(self) -> None:
        """Raise ValueError if the data are not for this model, which training has its own for."""
        check_data(self.dataloader.dataset, polar_model(self.runner))

    def names(self) -> list[str]:
        """Of the figures that `PolarMetric` will give."""
        self.evaluator.dataset_meta = self.dataloader.dataset.metainfo
        return [name for metric in self.evaluator.metrics for name in metric.names()]

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to evaluate."""
        return self.dataloader is None

    def run(self, is_asked_to_stop: Callable[[], bool] = lambda: False) -> Figures | None:
        """The metrics, after the hooks have seen them.

        Args:
            is_asked_to_stop: called after each pack, with the same answer on every rank: if it is
                True, evaluation ends there, and its result is None.
        """
        runner, stage = self.runner, self.stage
        runner.call_hook(f"before_{stage}")
        runner.call_hook(f"before_{stage}_epoch")
        runner.model.eval()
        metrics: Figures | None = {}
        for dataloader, control in ((self.dataloader, ""), (self._shuffled, SHUFFLED)):
            if dataloader is not None and metrics is not None:
                found = self._evaluate(dataloader, control, is_asked_to_stop)
                metrics = None if found is None else metrics | found
        if metrics is not None:
            runner.call_hook(f"after_{stage}_epoch", metrics=metrics)
        runner.call_hook(f"after_{stage}")
        return metrics

    @torch.no_grad()
    def _evaluate(
        self, dataloader: Any, control: str, is_asked_to_stop: Callable[[], bool]
    ) -> Figures | None:
        runner, stage = self.runner, self.stage
        self.evaluator.dataset_meta = {
            **dataloader.dataset.metainfo,
            "iteration": runner.iter,
            "control": control,
        }
        for number, batch in enumerate(dataloader):
            place = {"batch_idx": number, "data_batch": batch}
            if not control:
                runner.call_hook(f"before_{stage}_iter", **place)
            with precision(runner):
                outputs = getattr(runner.model, f"{stage}_step")(batch)
            self.evaluator.process(outputs, batch)
            if not control:
                runner.call_hook(f"after_{stage}_iter", **place, outputs=outputs)
            if is_asked_to_stop():
                for metric in self.evaluator.metrics:
                    metric.results.clear()
                return None
        return self.evaluator.evaluate(int(dataloader.dataset.pair_counts.sum()))


@LOOPS.register_module()
class PolarValLoop(_EvaluationLoop):
    __doc__ = _EvaluationLoop.__doc__
    stage = "val"


@LOOPS.register_module()
class PolarTestLoop(_EvaluationLoop):
    __doc__ = _EvaluationLoop.__doc__
    stage = "test"

    def run(self, *args: Any) -> Figures | None:
        if self.is_idle:
            raise ValueError("there is nothing to test on: set test_data_files")
        self.check()
        return super().run(*args)


def check_validation(loop: Any) -> None:
    """Compare what a `PolarTrainLoop` validates with what it trains and saves.

    Raises:
        ValueError: the data are not for the model, validations would split an optimizer step, or a
            checkpoint is to be kept by a figure that there is not.
    """
    runner, validation = loop.runner, loop.validation
    counts = loop.dataloader.sampler.accumulative_counts
    if validation is not None:
        validation.check()
        if loop.val_interval % counts:
            raise ValueError(
                f"validations every {loop.val_interval} iterations would split an optimizer step "
                f"of {counts}: set train_cfg.val_interval (val_steps) to a multiple of "
                "accumulative_counts"
            )
    wanted = [
        name
        for hook in runner.hooks
        if isinstance(hook, CheckpointHook)
        for name in hook.save_best or []
    ]
    if wanted and validation is None:
        raise ValueError(f"save_best={wanted[0]} needs rows to validate on: set val_data_files")
    if not wanted or validation is None or not validation.is_polar:
        return  # what other metrics give is known when they give it
    known = validation.names()
    for name in wanted:
        if name not in known:
            near = get_close_matches(name, known, 3) or known[:8]
            raise ValueError(
                f"save_best={name}: validation has no such figure; it has {', '.join(near)}"
            )


def _built(runner: Any, evaluator: Any) -> Evaluator:
    return evaluator if isinstance(evaluator, Evaluator) else runner.build_evaluator(evaluator)


def precision(runner: Any) -> AbstractContextManager[Any]:
    """What the config computes in while it trains: autocast, unless DeepSpeed decides."""
    dtype = autocast_dtype(runner.cfg)
    if dtype is None or deepspeed_config(runner) is not None:
        return nullcontext()
    device = next(unwrapped(runner.model).parameters()).device.type
    return torch.autocast(device, dtype)


@METRICS.register_module()
class PolarMetric(BaseMetric):  # type: ignore[misc]
    """Figures of the pairs (`evaluation.py`), of all ranks, at full precision.

    `<prefix>/accuracy` and so on are of all pairs, `<prefix>/<set>/accuracy` of a named set
    (`data_files` is a dict), `<prefix>/source/<source>/accuracy` of the rows of a `source`.

    Args:
        prefix: of the figures' names.
        length_bias: add `evaluation.length_figures` of all pairs.
        scores_file: a .jsonl or .parquet file for the rewards of every row; `{iter}` in its name
            stands for the iteration.

    Raises:
        ValueError: the scores' file has another ending.
    """

    default_prefix = "val"

    def __init__(
        self,
        prefix: str | None = None,
        length_bias: bool = False,
        scores_file: str | None = None,
    ) -> None:
        super().__init__(prefix=prefix)
        if scores_file is not None and not scores_file.endswith((".jsonl", ".parquet")):
            raise ValueError(
                f"scores_file must end in .jsonl or .parquet, got {scores_file!r}: it holds a line "
                "or a row for each row of the data"
            )
        self.length_bias = length_bias
        self.scores_file = scores_file

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """Keep the rewards of a pack's pairs, on their device."""
        if data_batch["data"]["pair_weights_P"].numpy().any():  # else it only fills a step
            (rewards,) = data_samples
            pairs = data_batch["data_samples"]["pairs"]
            self.results.append((pairs, rewards["chosen"], rewards["rejected"]))

    def evaluate(self, size: int) -> Figures:
        """Figures of the pairs of all ranks, the same on each.

        Raises:
            ValueError: a reward is not finite; names its row.
        """
        own = _joined(self.results)
        self.results.clear()
        every = _once(*map(np.concatenate, zip(*all_gather_object(own))))
        metrics = self.compute_metrics([every])
        control = self.dataset_meta.get("control", "")
        if self.scores_file is not None and not control and is_main_process():
            try:
                self._write(*every)
            except OSError as error:  # no reason to end a run
                logger.error("the scores could not be written: %s", error)
        prefix = "/".join(filter(None, (self.prefix, control)))
        # mmengine's log of a test drops numbers of numpy's other types.
        return {f"{prefix}/{name}": float(value) for name, value in metrics.items()}

    def compute_metrics(self, results: list[Any]) -> Figures:
        """Figures of a single (pairs, chosen rewards, rejected rewards), without prefix."""
        ((pairs, chosen, rejected),) = results
        self._check(pairs, chosen, rejected)
        scores = PairScores(
            chosen,
            rejected,
            pairs["chosen_length"],
            pairs["rejected_length"],
            # As objects: a string array is as wide as its longest string.
            np.array(self.dataset_meta["sources"], object)[pairs["source"]],
        )
        figures = pair_figures(chosen, rejected)
        if self.length_bias:
            figures |= length_figures(scores)
        for part, mask in self._parts(pairs):
            of_part = pair_figures(chosen[mask], rejected[mask])
            figures |= {f"{part}/{name}": value for name, value in of_part.items()}
        return figures

    def names(self) -> list[str]:
        """Of all figures that there will be."""
        nothing = np.empty(0)
        figures = self.compute_metrics([(np.empty(0, PAIR), nothing, nothing)])
        return [f"{self.prefix}/{name}" for name in figures]

    def _parts(self, pairs: NDArray[Any]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Sets and sources that have a name, and which of the pairs are theirs."""
        sets, sources = np.array(self.dataset_meta["sets"], object), self.dataset_meta["sources"]
        for name in dict.fromkeys(self.dataset_meta["sets"]):
            if name:
                yield name, sets[pairs["file"]] == name
        if len(sources) - 1 > MOST_SOURCES:
            logger.warning("no figures by source: there are %d sources", len(sources) - 1)
            return
        for number, name in enumerate(sources):
            if name:
                yield f"source/{one_line(name, len(name))}", pairs["source"] == number

    def _check(self, pairs: NDArray[Any], *rewards: NDArray[np.float64]) -> None:
        bad = np.flatnonzero(~np.isfinite(rewards).all(axis=0))
        if len(bad):
            files = self.dataset_meta["files"]
            rows = [f"{files[file]}:{line}" for file, line in pairs[bad][["file", "line"]].tolist()]
            shown = ", ".join(dict.fromkeys(rows[:20]))
            raise ValueError(
                f"{len(bad)} of {len(pairs)} pairs have a reward that is not finite, of the rows "
                f"{shown}: the weights are damaged or the precision overflows"
            )

    def _write(self, pairs: NDArray[Any], chosen: Any, rejected: Any) -> None:
        assert self.scores_file is not None
        name = self.scores_file.replace("{iter}", str(self.dataset_meta.get("iteration", 0)))
        path = Path(name)
        lines = _score_lines(self.dataset_meta, pairs, chosen, rejected)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            if path.suffix == ".jsonl":
                file.writelines(f"{json.dumps(line)}\n".encode() for line in lines)
            else:
                import pyarrow
                from pyarrow.parquet import write_table

                write_table(pyarrow.Table.from_pylist([*lines]), file)
        logger.info("scores of every row: %s", path)


def _joined(results: Sequence[Any]) -> tuple[NDArray[Any], ...]:
    """Pairs (P,) of dtype `PAIR`, their chosen and rejected rewards (P,) float64."""
    pairs = [np.empty(0, PAIR), *(pairs for pairs, *_ in results)]
    rewards = [
        torch.cat([torch.empty(0).double(), *(result[side].double().cpu() for result in results)])
        for side in (1, 2)
    ]
    return np.concatenate(pairs), *(reward.numpy() for reward in rewards)


def _once(pairs: NDArray[Any], *rewards: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Each pair once, in the order of its row: the same whatever ranks and packs there were."""
    order = np.lexsort([pairs[name] for name in reversed(PLACE)])
    places = np.stack([pairs[name][order] for name in PLACE], axis=1)
    new = np.ones(len(order), bool)
    new[1:] = (places[1:] != places[:-1]).any(axis=1)
    kept = order[new]
    return pairs[kept], *(reward[kept] for reward in rewards)


def _score_lines(
    meta: Mapping[str, Any], pairs: NDArray[Any], chosen: Any, rejected: Any
) -> Iterator[dict[str, Any]]:
    """What is written of every row: its place, set and source, the rewards of its candidates."""
    starts = np.flatnonzero(
        np.any([np.diff(pairs[name], prepend=-1) for name in ("file", "line")], axis=0)
    )
    for rows in np.split(np.arange(len(pairs)), starts[1:]) if len(pairs) else []:
        first = pairs[rows[0]]
        yield {
            "file": meta["files"][first["file"]],
            "line": int(first["line"]),
            "set": meta["sets"][first["file"]],
            "source": meta["sources"][first["source"]],
            "chosen_scores": _by_candidate(pairs["chosen_index"][rows], chosen[rows]),
            "rejected_scores": _by_candidate(pairs["rejected_index"][rows], rejected[rows]),
        }


def _by_candidate(indices: NDArray[Any], rewards: NDArray[np.float64]) -> list[float | None]:
    """By their places in the row; None for one that is in no pair, as none of it fits a pack."""
    known = dict(zip(indices.tolist(), rewards.tolist()))
    return [known.get(index) for index in range(max(known) + 1)]
