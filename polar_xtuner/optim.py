"""How the optimizer steps: learning rate, gradient clipping, precision of the forward pass."""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.registry import OPTIM_WRAPPERS, PARAM_SCHEDULERS
from torch import Tensor, nn


def autocast_dtype(config: Any) -> torch.dtype | None:
    """What a config's optimizer wrapper lets the forward pass compute in, None: the weights' own.

    DeepSpeed, where it trains, decides by itself.
    """
    wrapper = config.get("optim_wrapper") or {}
    kind, dtype = wrapper.get("type", ""), wrapper.get("dtype")
    if dtype is None and "Amp" in (kind if isinstance(kind, str) else kind.__name__):
        dtype = torch.float16  # the default of mmengine's
    return getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype


@OPTIM_WRAPPERS.register_module()
class PolarOptimWrapper(OptimWrapper):  # type: ignore[misc]
    """Steps without waiting for the device, on GPU and CPU alike.

    mmengine's `OptimWrapper` reads the gradient norm on the host in every step; its
    `AmpOptimWrapper` also scales the loss and reads whether a gradient overflowed, and needs a
    GPU. bfloat16 has the range of float32: there is nothing to scale.

    Args:
        optimizer: the runner gives it.
        dtype: to compute the forward pass in (autocast), `bfloat16`; None is the weights' own.
        accumulative_counts, clip_grad: as in mmengine.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, optimizer: Any, dtype: Any = None, **kwargs: Any) -> None:
        if dtype not in (None, "bfloat16", "torch.bfloat16", torch.bfloat16):
            raise ValueError(
                f"optim_wrapper.dtype must be None or 'bfloat16', got {str(dtype)!r}: without "
                "scaling the loss, small gradients are lost in float16. To train in float16, set "
                "optim_wrapper.type=AmpOptimWrapper"
            )
        super().__init__(optimizer, **kwargs)
        self.dtype = None if dtype is None else torch.bfloat16
        self.grad_norm: Tensor | None = None
        """Norm of the last step's gradients before they were clipped, on their device; None before
        the first step, and where `clip_grad` does not clip by norm."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        autocast = torch.autocast(device, self.dtype, enabled=self.dtype is not None)
        with super().optim_context(model), autocast:
            yield

    def _clip_grad(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.grad_norm = self.clip_func(parameters, **self.clip_grad_kwargs)


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
        self._from = (0, 0.0)
        super().__init__(optimizer, param_name="lr", end=end, **kwargs)

    def continue_at(self, iteration: int, step: int = 0, done: float = 0.0) -> None:
        """Take up the curve at an iteration of a resumed run.

        Args:
            step, done: optimizer step at which the ranks of the run changed, and the share of it
                before: from there on the rest of the curve is spread over the steps that are left.
        """
        self._from = step, done * self.total
        self.last_step = self._global_step = iteration
        for group, value in zip(self.optimizer.param_groups, self._get_value()):
            group[self.param_name] = value

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: peak and length of the curve are the config's; the loop says where to go on."""

    def factor(self, iteration: int) -> float:
        """Share of the peak learning rate at an iteration, counted from 0."""
        step: float = iteration // self.counts
        start, place = self._from
        if start:
            step = place + (step - start) * (self.total - place) / max(1, self.total - start)
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * min(1, progress))) / 2

    def _get_value(self) -> list[float]:
        return [base * self.factor(self.last_step) for base in self.base_values]
