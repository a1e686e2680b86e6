"""Plan -> this rank's packs: the sampler that a dataloader follows.

A run that is resumed on other ranks keeps what it has done: the groups that are left of the epoch
are planned anew for the ranks there are. So the packs of a run are a function of its `history`, the
optimizer steps at which ranks or accumulation changed.
"""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from polar_xtuner.dataset import PolarDataset
from polar_xtuner.packing import ModelShape, Pack, Plan, plan_epoch
from polar_xtuner.sequence_parallel import data_parallel_rank, data_parallel_size

logger = logging.getLogger(__name__)

MOST_IDLE = 0.1
"""Share of packs that only fill steps, above which the user is told."""


class Stretch(NamedTuple):
    """From an optimizer step on, a run has so many ranks and packs a rank."""

    step: int
    ranks: int
    accumulation: int


class _Part(NamedTuple):
    """A plan and the optimizer steps of the run that follow it."""

    first: int
    steps: int
    plan: Plan


@DATA_SAMPLERS.register_module()
class PackSampler(Sampler[Pack]):
    """This rank's packs, epoch after epoch, from any iteration on.

    Args:
        dataset: whose groups are planned.
        accumulative_counts: packs a rank adds up before the optimizer steps.
        pairs_per_step: pairs of an optimizer step; None fills the packs.
        seed: of the plan; the runner gives its own.
    """

    def __init__(
        self,
        dataset: PolarDataset,
        accumulative_counts: int = 1,
        pairs_per_step: int | None = None,
        seed: int = 0,
    ) -> None:
        self.accumulative_counts = accumulative_counts
        self.pairs_per_step = pairs_per_step
        self.seed = seed
        self.start_iter = 0
        self.model_shape: ModelShape | None = None
        """Of the model that is trained, set before the first plan: it says what a group costs."""
        self.dataset = dataset
        self.follow([self.now(0)])

    def now(self, step: int) -> Stretch:
        """What a run has from that step on if nothing changes any more."""
        return Stretch(step, data_parallel_size(), self.accumulative_counts)

    def follow(self, history: list[Stretch]) -> None:
        """Plan for a run with that history."""
        self.history = history
        self._planned: tuple[int, list[_Part]] | None = None
        self._ends = [0]  # optimizer steps before each epoch

    def __len__(self) -> int:
        return self.iterations(1)

    def __iter__(self) -> Iterator[Pack]:
        """Packs from `start_iter` on, without end."""
        step, slot = divmod(self.start_iter, self.accumulative_counts)
        epoch = 0
        while True:
            end = self._end(epoch)
            while step < end:
                part = next(p for p in reversed(self.parts(epoch)) if p.first <= step)
                for iteration in range(slot, self.accumulative_counts):
                    before = (step - part.first) * self.accumulative_counts
                    yield part.plan.pack(before + iteration, data_parallel_rank())
                step, slot = step + 1, 0
            epoch += 1

    def iterations(self, epochs: int) -> int:
        """Packs a rank goes through in that many epochs, at the accumulation there is now; packing
        differs a little by epoch."""
        return self._end(epochs - 1) * self.accumulative_counts

    def share_done(self, step: int, epochs: int) -> float:
        """Share of the pairs of so many epochs that lie before an optimizer step."""
        epoch = next((e for e in range(epochs) if step < self._end(e)), epochs)
        if epoch == epochs:
            return 1.0
        part = next(p for p in reversed(self.parts(epoch)) if p.first <= step)
        _, starts, stops = part.plan.rest(step - part.first).T
        pairs = self.dataset.pair_counts.sum()
        return float((epoch + 1 - (stops - starts).sum() / pairs) / epochs)

    def parts(self, epoch: int) -> list[_Part]:
        """The plans of an epoch, one for every stretch of `history` that lies in it."""
        if self._planned is None or self._planned[0] != epoch:
            first = self._end(epoch - 1) if epoch else 0
            self._planned = epoch, self._plan(epoch, first)
        return self._planned[1]

    def _end(self, epoch: int) -> int:
        """Optimizer steps of the run up to the end of an epoch."""
        while len(self._ends) <= epoch + 1:
            last = self.parts(len(self._ends) - 1)[-1]
            self._ends.append(last.first + last.steps)
        return self._ends[epoch + 1]

    def _plan(self, epoch: int, first: int) -> list[_Part]:
        parts: list[_Part] = []
        rest = None
        while True:
            stretch = next(s for s in reversed(self.history) if s.step <= first)
            plan = self._plan_rest(epoch, stretch, rest)
            later = [s.step for s in self.history if first < s.step < first + plan.steps]
            steps = min(later, default=first + plan.steps) - first
            parts.append(_Part(first, steps, plan))
            if not later:
                return parts
            first, rest = first + steps, plan.rest(steps)

    def _plan_rest(self, epoch: int, stretch: Stretch, rest: Any) -> Plan:
        data, shape = self.dataset, self.model_shape
        plan = plan_epoch(
            data.lengths,
            data.pair_counts,
            data.lengths if shape is None else shape.flops(data.lengths, data.attended),
            data.max_packed_length,
            pairs_per_step=self.pairs_per_step,
            seed=self.seed,
            epoch=epoch,
            ranks=stretch.ranks,
            accumulation=stretch.accumulation,
            rest=rest,
        )
        idle = np.count_nonzero(plan.pair_weights == 0) / len(plan.pair_weights)
        if epoch == 0 and rest is None and idle > MOST_IDLE:
            logger.warning(
                "%.0f %% of the packs hold nothing new: there are too few groups for the %d packs "
                "of an optimizer step. Lower accumulative_counts, raise pairs_per_step, or set "
                "group_candidates=False",
                100 * idle,
                plan.ranks * plan.accumulation,
            )
        return plan


@DATA_SAMPLERS.register_module()
class EvaluationSampler(Sampler[Pack]):
    """This rank's packs of all groups, once; every rank gets as many.

    Where there are too few packs for all, some hold a group that counts elsewhere, at weight 0.
    """

    def __init__(self, dataset: PolarDataset, seed: int = 0) -> None:
        groups = np.arange(len(dataset.lengths))
        self._plan = plan_epoch(
            dataset.lengths,
            dataset.pair_counts,
            dataset.lengths,
            dataset.max_packed_length,
            seed=seed,
            ranks=data_parallel_size(),
            # As if it were the rest of an epoch: there may be fewer groups than ranks.
            rest=np.stack([groups, np.zeros_like(groups), dataset.pair_counts], axis=1),
        )

    def __len__(self) -> int:
        return self._plan.iterations

    def __iter__(self) -> Iterator[Pack]:
        for iteration in range(len(self)):
            yield self._plan.pack(iteration, data_parallel_rank())
