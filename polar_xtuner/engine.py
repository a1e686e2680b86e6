"""What xtuner's runner calls: the training loop and what it needs beside it.

Importing this module registers everything a config can name, so configs say
`custom_imports = dict(imports=["polar_xtuner.engine"])`.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import logging
import time
from dataclasses import fields
from typing import Any

import torch
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import FUNCTIONS, LOOPS
from mmengine.runner import IterBasedTrainLoop
from torch import Tensor
from xtuner.registry import BUILDER

from polar_xtuner.collate import collate_pack
from polar_xtuner.metrics import Interval, peak_flops
from polar_xtuner.modeling_internlm2 import InternLM2Config, first_names
from polar_xtuner.optim import PolarOptimWrapper
from polar_xtuner.packing import ModelShape
from polar_xtuner.reward_model import PolarRewardModel
from polar_xtuner.sampler import PackSampler
from polar_xtuner.template import check_vocabulary

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
        if _deepspeed_config(runner) is not None:
            return  # DeepSpeed loads its own files, strictly
        state = checkpoint.get("state_dict", checkpoint)
        lacking = sorted(set(_unwrapped(runner.model).state_dict()) - set(state))
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
        val_begin, val_interval: as in mmengine.

    Raises:
        ValueError: a setting contradicts another.
        NonFiniteError: loss or gradient is NaN or infinite.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        val_begin: int = 1,
        val_interval: int = 1000,
    ) -> None:
        if (max_epochs is None) == (max_iters is None):
            raise ValueError("train_cfg needs either max_epochs or max_iters, and not both")
        for name, value in (("max_epochs", max_epochs), ("max_iters", max_iters)):
            if value is not None and (value != int(value) or value < 1):
                raise ValueError(f"train_cfg.{name} must be a whole number >= 1, got {value}")
        if isinstance(dataloader, dict):
            dataloader = runner.build_dataloader(dataloader, seed=runner.seed)
        sampler = dataloader.sampler
        if not isinstance(sampler, PackSampler):
            raise ValueError(
                "PolarTrainLoop needs train_dataloader.sampler.type=PackSampler, got "
                f"{type(sampler).__name__}"
            )
        counts = sampler.accumulative_counts
        if max_iters is not None and max_iters % counts:
            raise ValueError(
                f"max_iters={max_iters} must be a multiple of accumulative_counts={counts}: "
                "the last optimizer step would lack packs"
            )
        # Before the first plan, which balances what packs cost.
        sampler.model_shape = _model_shape(runner)
        iterations = max_iters or sampler.iterations(int(max_epochs or 0))
        super().__init__(runner, dataloader, iterations, val_begin, val_interval)
        del self.dataloader_iterator  # `run` starts one where training starts
        self._report = ReportHook()
        runner.register_hook(self._report)
        runner.register_hook(CompleteCheckpointHook())

    def run(self) -> Any:
        runner = self.runner
        self._check_data_against_model()
        self._check_accumulation()
        self._check_precision()
        runner.log_processor.window_size = 1  # what is logged is of a whole interval already
        self._interval = _interval(runner, self.dataloader.dataset.max_packed_length)
        self._rows: dict[int, list[str]] = {}
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")
        self.dataloader.sampler.start_iter = self._iter
        batches = iter(self.dataloader)
        runner.model.train()
        while self._iter < self._max_iters and not self.stop_training:
            self._interval.start()
            waiting = time.perf_counter()
            batch = next(batches)
            self._interval.add_wait(time.perf_counter() - waiting)
            self.run_iter(batch)
            if self._validates(self._iter):
                runner.val_loop.run()
                runner.model.train()
        self._check()
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        return runner.model

    def run_iter(self, data_batch: dict[str, Any]) -> None:
        runner, place = self.runner, {"batch_idx": self._iter, "data_batch": data_batch}
        self._rows[self._iter] = data_batch["data_samples"]["rows"]
        runner.call_hook("before_train_iter", **place)
        try:
            outputs = runner.model.train_step(data_batch, optim_wrapper=runner.optim_wrapper)
        except RuntimeError as error:
            if "non-finite" in str(error):  # torch's clip_grad_norm_(error_if_nonfinite=True)
                loss = _polar_model(runner).pack_loss
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
        if _deepspeed_config(self.runner) is not None:
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
        return self.runner.val_loop is not None and done >= self.val_begin and due

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

    def _check_data_against_model(self) -> None:
        model = _polar_model(self.runner)
        dataset = self.dataloader.dataset
        check_vocabulary(dataset.special_ids, model.config.vocab_size)
        scaling = model.config.rope_scaling or {}
        factor = scaling["factor"] if scaling.get("type") == "linear" else 1
        longest = int(factor * model.config.max_position_embeddings)
        if dataset.max_length > longest:
            raise ValueError(
                f"max_length={dataset.max_length} is more than the {longest} positions of the "
                "model (max_position_embeddings): lower max_length"
            )

    def _check_accumulation(self) -> None:
        deepspeed = _deepspeed_config(self.runner)
        if deepspeed is not None:
            counts = deepspeed["gradient_accumulation_steps"]
        else:
            counts = self.runner.optim_wrapper._accumulative_counts
        planned = self.dataloader.sampler.accumulative_counts
        if counts != planned:
            raise ValueError(
                f"the optimizer accumulates {counts} packs, the sampler plans for {planned}: set "
                "optim_wrapper.accumulative_counts and train_dataloader.sampler."
                "accumulative_counts to the same number"
            )
        saves = [h.interval for h in self.runner.hooks if isinstance(h, CheckpointHook)]
        if any(interval > 0 and interval % planned for interval in saves):
            raise ValueError(
                f"checkpoints every {saves} iterations would split an optimizer step of {planned}: "
                "set default_hooks.checkpoint.interval to a multiple of accumulative_counts"
            )
        if self._iter % planned:
            raise ValueError(
                f"the checkpoint stands at iteration {self._iter}, within an optimizer step of "
                f"{planned}: resume from one at a multiple of accumulative_counts"
            )

    def _check_precision(self) -> None:
        dtypes = {p.dtype for p in self.runner.model.parameters() if p.requires_grad}
        half = dtypes & {torch.float16, torch.bfloat16}
        if isinstance(self.runner.optim_wrapper, (AmpOptimWrapper, PolarOptimWrapper)) and half:
            raise ValueError(
                f"trained weights are {half.pop()} without a float32 copy, which loses small "
                "updates: set model.llm.torch_dtype to float32, or train with --deepspeed"
            )


def _deepspeed_config(runner: Any) -> dict[str, Any] | None:
    """What DeepSpeed runs with, None where it does not: then the runner has no such strategy."""
    return getattr(getattr(runner, "strategy", None), "config", None)


def _unwrapped(model: Any) -> Any:
    """The model inside DDP or a DeepSpeed engine."""
    if is_model_wrapper(model):
        model = model.module
    elif hasattr(model, "model") and not isinstance(model, PolarRewardModel):
        model = model.model
        model = getattr(model, "module", model)
    return model


def _polar_model(runner: Any) -> PolarRewardModel:
    model = _unwrapped(runner.model)
    if not isinstance(model, PolarRewardModel):
        raise ValueError(f"PolarTrainLoop trains a PolarRewardModel, got {type(model).__name__}")
    return model


def _model_shape(runner: Any) -> ModelShape:
    """Of the model, or of the one that will be built: with DeepSpeed it is a config until then."""
    names = [field.name for field in fields(ModelShape)]
    if isinstance(runner.model, dict):
        llm = runner.model["llm"]
        given = {name: llm[name] for name in names if name in llm}
        config = InternLM2Config.from_pretrained(llm["pretrained_model_name_or_path"], **given)
    else:
        config = _polar_model(runner).config
    return ModelShape(**{name: getattr(config, name) for name in names})


def _interval(runner: Any, max_packed_length: int) -> Interval:
    """Counts what a run does on the device it runs on."""
    model, peak = _polar_model(runner), None
    if model.data_preprocessor.device.type == "cuda":
        name = torch.cuda.get_device_name()
        peak = peak_flops(name)
        if peak is None:
            logger.info("mfu is not logged: the peak of %s is not known", name)
    frozen = hasattr(model.llm, "peft_config")
    return Interval(_model_shape(runner), max_packed_length, frozen=frozen, peak=peak)
