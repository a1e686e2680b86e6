"""What xtuner's runner calls: the training loop and what it needs beside it.

Importing this module registers everything a config can name, so configs say
`custom_imports = dict(imports=["polar_xtuner.engine"])`.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import logging
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.dist import barrier, get_world_size
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.logging import print_log
from mmengine.registry import FUNCTIONS, LOOPS
from mmengine.runner import IterBasedTrainLoop
from torch import Tensor
from xtuner.registry import BUILDER

from polar_xtuner import repartition
from polar_xtuner.checkpoint import CheckpointError, PolarCheckpointHook
from polar_xtuner.checks import (
    check_model,
    check_settings,
    deepspeed_config,
    polar_model,
    shape_of,
    unwrapped,
)
from polar_xtuner.collate import collate_pack
from polar_xtuner.interruption import STOPPED, Agreement, Interruption
from polar_xtuner.metrics import Interval, peak_flops
from polar_xtuner.modeling_internlm2 import first_names
from polar_xtuner.optim import PolarOptimWrapper, WarmupCosineLR
from polar_xtuner.overview import overview
from polar_xtuner.resume import RECORD, find_checkpoint, record_of, settle
from polar_xtuner.runners import build_dataloader, take_weights
from polar_xtuner.val_log import PolarLogProcessor  # noqa: F401
from polar_xtuner.validation import PolarValLoop, check_validation

for registry in (BUILDER, FUNCTIONS):
    registry.register_module(module=collate_pack, name="collate_pack")


class _ToRunnerLog(logging.Handler):
    """Messages of this package go where mmengine's go: the console and the run's log file."""

    def emit(self, record: logging.LogRecord) -> None:
        print_log(self.format(record), logger="current", level=record.levelno)


logger = logging.getLogger(__name__)
_package_logger = logging.getLogger("polar_xtuner")
if not _package_logger.handlers:
    _package_logger.addHandler(_ToRunnerLog())
    _package_logger.setLevel(logging.INFO)
    _package_logger.propagate = False


class NonFiniteError(RuntimeError):
    """Loss or gradient became NaN or infinite."""


class CompleteCheckpointHook(Hook):  # type: ignore[misc]
    """Refuses to train on from a checkpoint that lacks tensors; mmengine only logs it."""

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError with the names of the trained tensors that `checkpoint` lacks."""
        if deepspeed_config(runner) is not None:
            return  # DeepSpeed loads its own files, strictly
        state = checkpoint.get("state_dict", checkpoint)
        lacking = sorted(set(unwrapped(runner.model).state_dict()) - set(state))
        if lacking:
            raise ValueError(
                f"the checkpoint to load lacks {len(lacking)} tensors of this model: "
                f"{first_names(lacking)}"
            )


class ReportHook(Hook):  # type: ignore[misc]
    """Hands the values of a logging interval to mmengine's log."""

    priority = 55  # after IterTimerHook, whose times are of one iteration; before LoggerHook

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in self.values.items():
            runner.message_hub.update_scalar(f"train/{name}", value)
        self.values = {}


@LOOPS.register_module()
class PolarTrainLoop(IterBasedTrainLoop):  # type: ignore[misc]
    """Train for epochs or iterations over the plan of a `PackSampler`.

    Unlike its base it resumes at the next pack without replaying those before it, and checks at
    the start that config, data and model agree. It never waits for the device between two checks:
    hooks get no `outputs`. A check comes with each log line, checkpoint and validation, and at the
    end; it stops the run at a loss or gradient that was not finite, naming the rows of the
    optimizer step.

    Args:
        max_epochs, max_iters: exactly one of them.
        val_begin, val_interval: as in mmengine; None validates at the end only.
        time_limit: "HH:MM:SS" or seconds after the start of the process at which to write a
            checkpoint and stop, as for a signal (`interruption.py`).
        resume_changed: resume although data, template, limits, seed or packing are not those of
            the checkpoint.

    Raises:
        ValueError: a setting contradicts another, or the checkpoint to resume from.
        NonFiniteError: loss or gradient is NaN or infinite.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        val_begin: int = 1,
        val_interval: int | None = 1000,
        time_limit: str | float | None = None,
        resume_changed: bool = False,
    ) -> None:
        if (max_epochs is None) == (max_iters is None):
            raise ValueError("train_cfg needs either max_epochs or max_iters, and not both")
        for name, value in (("max_epochs", max_epochs), ("max_iters", max_iters)):
            if value is not None and (value != int(value) or value < 1):
                raise ValueError(f"train_cfg.{name} must be a whole number >= 1, got {value}")
        if val_interval is not None and (val_interval != int(val_interval) or val_interval < 1):
            raise ValueError(
                "train_cfg.val_interval must be a whole number >= 1, or None to validate at the "
                f"end only, got {val_interval}"
            )
        self.interruption = Interruption(None if time_limit is None else _seconds(time_limit))
        if isinstance(dataloader, dict):
            dataloader = build_dataloader(runner, dataloader, runner.model)
        sampler = dataloader.sampler
        counts = sampler.accumulative_counts
        if max_iters is not None and max_iters % counts:
            raise ValueError(
                f"max_iters={max_iters} must be a multiple of accumulative_counts={counts}: "
                "the last optimizer step would lack packs"
            )
        check_settings(runner, sampler)
        self._record = record_of(sampler)
        is_deepspeed = deepspeed_config(runner) is not None
        checkpoint = find_checkpoint(runner, is_deepspeed)
        self._resumed_at = 0
        if checkpoint is not None:
            self._resumed_at = settle(
                checkpoint,
                sampler,
                self._record,
                seed_is_set=runner.cfg.get("randomness", {}).get("seed") is not None,
                changed=resume_changed,
            )
            if is_deepspeed:
                repartition.prepare_resume(runner.strategy, checkpoint, get_world_size())
        elif runner._load_from is not None and is_deepspeed:
            repartition.prepare_weights(runner.strategy, Path(runner._load_from))
        elif runner._load_from is not None and Path(runner._load_from).is_dir():
            runner.load_checkpoint = lambda path: take_weights(runner.model, path)
        self.epochs = epochs = int(max_epochs or 0)
        """Of the run, 0 where its length is `max_iters`."""
        iterations = max_iters or sampler.iterations(epochs)
        if checkpoint is not None and self._resumed_at >= iterations:
            logger.warning("%s stands at the end of the run: nothing is left to do", checkpoint)
        self._changed_at = (0, 0.0)
        """Optimizer step of the last change of ranks, and share of the run before it."""
        if epochs and len(sampler.history) > 1:
            step = sampler.history[-1].step
            self._changed_at = step, sampler.share_done(step, epochs)
        super().__init__(runner, dataloader, iterations, val_begin, val_interval or iterations)
        del self.dataloader_iterator  # `run` starts one where training starts
        self._report = ReportHook()
        runner.register_hook(self._report)
        runner.register_hook(CompleteCheckpointHook())

    def run(self) -> Any:
        """Train to the end, or until asked to stop: then the process exits with `STOPPED`."""
        with self.interruption:
            self._train(Agreement())
        return self.runner.model

    def _train(self, agreement: Agreement) -> None:
        runner, sampler = self.runner, self.dataloader.sampler
        check_model(runner, self.dataloader.dataset)
        self._take_up()
        check_validation(self)
        runner.log_processor.window_size = 1  # what is logged is of a whole interval already
        self._interval = _interval(runner, self.dataloader.dataset.max_packed_length)
        self._rows: dict[int, list[str]] = {}
        runner.call_hook("before_train")
        logger.info("%s", overview(runner, self))
        runner.call_hook("before_train_epoch")
        sampler.start_iter = self._iter
        batches = iter(self.dataloader)
        if self._resumed_at and self._validates(self._iter):
            self._validate(agreement)  # which a stop may have left out
        runner.model.train()
        while self._iter < self._max_iters and not self.stop_training:
            self._interval.start()
            waiting = time.perf_counter()
            batch = next(batches)
            self._interval.add_wait(time.perf_counter() - waiting)
            self.run_iter(batch)
            ends_step = self._iter % sampler.accumulative_counts == 0
            asked = ends_step and agreement.any(self.interruption.is_due())
            if asked and self._iter < self._max_iters:
                self._stop(agreement)
            if self._validates(self._iter):
                self._validate(agreement)
        agreement.close()
        self._check()
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")

    def _take_up(self) -> None:
        """Go on where the checkpoint stands, in this run's count of iterations."""
        runner, record = self.runner, self._record
        history = [list(stretch) for stretch in self.dataloader.sampler.history]
        runner.message_hub.update_info(RECORD, {**record, "history": history})
        if not self._resumed_at:
            return
        self._iter = self._resumed_at
        if deepspeed_config(runner) is None:
            # mmengine has counted from the checkpoint's iteration, of another accumulation maybe.
            runner.optim_wrapper.initialize_count_status(runner.model, self._iter, self._max_iters)
        for scheduler in runner.param_schedulers or []:
            if isinstance(scheduler, WarmupCosineLR):
                scheduler.continue_at(self._iter, *self._changed_at)

    @property
    def validation(self) -> Any:
        """The loop that validates, None where no data are named for it."""
        loop = self.runner.val_loop
        if loop is not None and not isinstance(loop, PolarValLoop):
            raise ValueError(
                f"this loop validates with val_cfg.type=PolarValLoop, got {type(loop).__name__}"
            )
        return None if loop is None or loop.is_idle else loop

    def _validate(self, agreement: Agreement) -> None:
        """Validate, or stop if asked to meanwhile: a resumed run begins with it again."""
        metrics = self.validation.run(lambda: agreement.any(self.interruption.is_due()))
        if metrics is None:
            self._stop(agreement)
        self.runner.model.train()

    def _stop(self, agreement: Agreement) -> NoReturn:
        """Write a checkpoint of the iterations so far and end the process."""
        agreement.close()
        runner, reason = self.runner, self.interruption.reason or "another process"
        self._check()
        self._iter -= 1  # as hooks see it after an iteration
        hooks = [hook for hook in runner.hooks if isinstance(hook, PolarCheckpointHook)]
        saved = [hook.save(runner) for hook in hooks]
        runner.call_hook("after_run")
        barrier()  # a launcher ends the others when one has gone
        if not saved or not all(saved):
            raise CheckpointError(f"stopped for {reason}, and no checkpoint could be written")
        logger.warning(
            "stopped for %s after iteration %d: %s is the checkpoint to resume from",
            reason,
            self._iter + 1,
            hooks[0].last_ckpt,
        )
        sys.exit(STOPPED)

    def run_iter(self, data_batch: dict[str, Any]) -> None:
        runner, place = self.runner, {"batch_idx": self._iter, "data_batch": data_batch}
        self._rows[self._iter] = data_batch["data_samples"]["rows"]
        runner.call_hook("before_train_iter", **place)
        try:
            outputs = runner.model.train_step(data_batch, optim_wrapper=runner.optim_wrapper)
        except RuntimeError as error:
            if "non-finite" in str(error):  # torch's clip_grad_norm_(error_if_nonfinite=True)
                loss = polar_model(runner).pack_loss
                own = loss is None or not torch.isfinite(loss)
                where = "on this rank" if own else "on some rank"
                raise self._non_finite("gradient", where, self._iter) from error
            raise
        self._interval.add(self._iter, data_batch["data"], outputs, self._grad_norm())
        logs = self._logs()
        if logs or self._saves() or self._validates(self._iter + 1):
            self._check()
        if logs:
            self._report.values = self._interval.values()
        runner.call_hook("after_train_iter", **place)
        self._iter += 1

    def _grad_norm(self) -> Tensor | float | None:
        """Of all ranks' gradients, if the optimizer has just stepped and tells it."""
        if (self._iter + 1) % self.dataloader.sampler.accumulative_counts:
            return None
        if deepspeed_config(self.runner) is not None:
            return self.runner.model.get_global_grad_norm()
        wrapper = self.runner.optim_wrapper
        return wrapper.grad_norm if isinstance(wrapper, PolarOptimWrapper) else None

    def _logs(self) -> bool:
        """Whether mmengine writes a log line after this iteration: the conditions are its own."""
        number, epoch = self._iter + 1, len(self.dataloader)
        return any(
            number % hook.interval == 0
            or (number == epoch and (not hook.ignore_last or epoch <= hook.interval))
            for hook in self.runner.hooks
            if isinstance(hook, LoggerHook)
        )

    def _saves(self) -> bool:
        """Whether a checkpoint may be saved after this iteration."""
        return self._iter + 1 == self._max_iters or any(
            not hook.by_epoch
            and hook.every_n_train_iters(self.runner, hook.interval, hook.save_begin)
            for hook in self.runner.hooks
            if isinstance(hook, CheckpointHook)
        )

    def _validates(self, done: int) -> bool:
        """Whether validation follows that many iterations."""
        due = done % self.val_interval == 0 or done == self._max_iters
        return due and done >= self.val_begin and self.validation is not None

    def _check(self) -> None:
        """Raise NonFiniteError, on every rank, if an iteration since the last was not finite."""
        found = self._interval.reduce()
        if found is not None:
            raise self._non_finite(found.what, found.where, found.iteration)
        step = self._step_of(self._iter)
        self._rows = {i: rows for i, rows in self._rows.items() if self._step_of(i) == step}

    def _step_of(self, iteration: int) -> int:
        return iteration // self.dataloader.sampler.accumulative_counts

    def _non_finite(self, what: str, where: str, iteration: int) -> NonFiniteError:
        step = self._step_of(iteration)
        rows = [row for i in self._rows if self._step_of(i) == step for row in self._rows[i]]
        return NonFiniteError(
            f"the {what} of iteration {iteration} is not finite {where}. The run stops at "
            f"iteration {self._iter}, the first check after it; the weights may be lost, but no "
            "checkpoint of these iterations was saved: resume from the last one. Rows of this "
            f"rank's optimizer step: {', '.join(rows)}"
        )


def _seconds(limit: str | float) -> float:
    """Of "HH:MM:SS" or a number.

    Raises:
        ValueError: it is neither, or not positive.
    """
    parts = [float(part) for part in str(limit).split(":") if part.replace(".", "", 1).isdigit()]
    seconds = sum(part * 60**place for place, part in enumerate(reversed(parts)))
    if len(parts) not in (1, 3) or len(parts) != str(limit).count(":") + 1 or not seconds:
        raise ValueError(f"train_cfg.time_limit must be 'HH:MM:SS' or seconds, got {limit!r}")
    return seconds


def _interval(runner: Any, max_packed_length: int) -> Interval:
    """Counts what a run does on the device it runs on."""
    model, peak = polar_model(runner), None
    if model.data_preprocessor.device.type == "cuda":
        name = torch.cuda.get_device_name()
        peak = peak_flops(name)
        if peak is None:
            logger.info("mfu is not logged: the peak of %s is not known", name)
    frozen = hasattr(model.llm, "peft_config")
    return Interval(shape_of(model), max_packed_length, frozen=frozen, peak=peak)
