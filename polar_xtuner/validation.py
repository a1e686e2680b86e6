"""Evaluation by the runner: while a model trains, and by `xtuner test`.

Rows are packed and share their prefixes as in training, are spread over all ranks, and are computed
in the precision of training; what their rewards come to is `polar_metric.py`'s.

What a dataloader to evaluate with leaves unsaid is as in `train_dataloader`: tokenizer, template,
limits, packs. Its rows are in the config's `val_data_files` or `test_data_files`, unless it names
some itself; without any there is nothing to do.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook
from mmengine.registry import LOOPS
from mmengine.runner.base_loop import BaseLoop

from polar_xtuner.checks import check_data, deepspeed_config, polar_model, unwrapped
from polar_xtuner.interruption import quieten
from polar_xtuner.optim import autocast_dtype
from polar_xtuner.polar_metric import Figures, PolarMetric
from polar_xtuner.sampler import EvaluationSampler

OWN = ("data_files", "dataset", "shuffled_references")
"""Arguments of a dataset that are never taken over from that of training."""

SHUFFLED = "shuffled_references"


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
