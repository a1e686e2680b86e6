"""What xtuner's runner calls: the training loop and what it needs beside it.

Importing this module registers everything a config can name, so configs say
`custom_imports = dict(imports=["polar_xtuner.engine"])`.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import logging
import math
from typing import Any

import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.registry import FUNCTIONS, LOOPS, PARAM_SCHEDULERS
from mmengine.runner import IterBasedTrainLoop
from xtuner.registry import BUILDER

from polar_xtuner.collate import collate_pack
from polar_xtuner.modeling_internlm2 import first_names
from polar_xtuner.reward_model import PolarRewardModel
from polar_xtuner.sampler import PackSampler
from polar_xtuner.template import check_vocabulary

for registry in (BUILDER, FUNCTIONS):
    registry.register_module(module=collate_pack, name="collate_pack")


class _ToRunnerLog(logging.Handler):
    """Messages of this package go where mmengine's go: the console and the run's log file."""

    def emit(self, record: logging.LogRecord) -> None:
        print_log(self.format(record), logger="current", level=record.levelno)


_package_logger = logging.getLogger("polar_xtuner")
if not _package_logger.handlers:
    _package_logger.addHandler(_ToRunnerLog())
    _package_logger.setLevel(logging.INFO)
    _package_logger.propagate = False


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):  # type: ignore[misc]
    """Learning rate of the published recipe, as a function of the optimizer step alone.

    It rises linearly over the first `warmup_ratio` of the run (one step at least) and falls with
    a cosine to `final_lr_ratio` of its peak, the same for any split of the steps into ranks and
    accumulation. mmengine's own schedulers multiply from one iteration to the next, so that a
    warm-up of one iteration leaves them near zero for the whole run.

    Args:
        optimizer: or its wrapper; the runner gives it.
        warmup_ratio: share of the run.
        final_lr_ratio: share of the peak.
        accumulative_counts: iterations of an optimizer step.
        end: iterations of the run; the runner gives it where `by_epoch=False`.
    """

    def __init__(
        self,
        optimizer: Any,
        warmup_ratio: float = 0.03,
        final_lr_ratio: float = 0.1,
        accumulative_counts: int = 1,
        end: int = 1,
        **kwargs: Any,
    ) -> None:
        self.counts = accumulative_counts
        self.total = math.ceil(end / accumulative_counts)
        self.warmup = max(1, math.ceil(warmup_ratio * self.total))
        self.final = final_lr_ratio
        super().__init__(optimizer, param_name="lr", end=end, **kwargs)

    def factor(self, iteration: int) -> float:
        """Share of the peak learning rate at an iteration, counted from 0."""
        step = iteration // self.counts
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * min(1, progress))) / 2

    def _get_value(self) -> list[float]:
        return [base * self.factor(self.last_step) for base in self.base_values]


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


@LOOPS.register_module()
class PolarTrainLoop(IterBasedTrainLoop):  # type: ignore[misc]
    """Train for epochs or iterations over the plan of a `PackSampler`.

    Unlike its base it resumes at the next pack without replaying those before it, checks at the
    start that config, data and model agree, and stops at the first non-finite loss or gradient,
    naming the rows of the optimizer step.

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
        iterations = max_iters or sampler.iterations(int(max_epochs or 0))
        super().__init__(runner, dataloader, iterations, val_begin, val_interval)
        del self.dataloader_iterator  # `run` starts one where training starts
        runner.register_hook(CompleteCheckpointHook())
        self._rows: list[str] = []

    def run(self) -> Any:
        self._check_data_against_model()
        self._check_accumulation()
        self._check_precision()
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        self.dataloader.sampler.start_iter = self._iter
        batches = iter(self.dataloader)
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(batches))
            self._decide_current_val_interval()
            due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
            if self.runner.val_loop is not None and self._iter >= self.val_begin and due:
                self.runner.val_loop.run()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_iter(self, data_batch: dict[str, Any]) -> None:
        if self._iter % self.dataloader.sampler.accumulative_counts == 0:
            self._rows = []
        self._rows += data_batch["data_samples"]["rows"]
        runner, place = self.runner, {"batch_idx": self._iter, "data_batch": data_batch}
        runner.call_hook("before_train_iter", **place)
        try:
            outputs = runner.model.train_step(data_batch, optim_wrapper=runner.optim_wrapper)
        except RuntimeError as error:
            if "non-finite" in str(error):  # torch's clip_grad_norm_(error_if_nonfinite=True)
                raise self._non_finite("gradient") from error
            raise
        loss = float(outputs["loss"])  # mmengine's hooks read it in any case
        if not math.isfinite(loss):  # before a hook can save a checkpoint
            raise self._non_finite(f"loss ({loss})")
        runner.call_hook("after_train_iter", outputs=outputs, **place)
        self._iter += 1

    def _non_finite(self, what: str) -> NonFiniteError:
        own = _unwrapped(self.runner.model).pack_loss
        place = "on this rank" if own is None or not torch.isfinite(own) else "on some rank"
        return NonFiniteError(
            f"the {what} of iteration {self._iter} is not finite {place}; training stops before "
            f"it is lost in the weights. Rows of this rank's optimizer step: "
            f"{', '.join(self._rows)}"
        )

    def _check_data_against_model(self) -> None:
        model = _unwrapped(self.runner.model)
        if not isinstance(model, PolarRewardModel):
            raise ValueError(
                f"PolarTrainLoop trains a PolarRewardModel, got {type(model).__name__}"
            )
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
        if isinstance(self.runner.optim_wrapper, AmpOptimWrapper) and half:
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
