"""Plan -> this rank's packs: the sampler that a dataloader follows."""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

import logging
from collections.abc import Iterator

import numpy as np
from mmengine.dist import get_rank, get_world_size
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from polar_xtuner.dataset import PolarDataset
from polar_xtuner.packing import ModelShape, Pack, Plan, plan_epoch

logger = logging.getLogger(__name__)

MOST_IDLE = 0.1
"""Share of packs that only fill steps, above which the user is told."""


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
        self.start_iter = 0
        self.model_shape: ModelShape | None = None
        """Of the model that is trained, set before the first plan: it says what a group costs."""
        self._dataset = dataset
        self._seed = seed
        self._planned: tuple[int, Plan] | None = None
        self._iterations: dict[int, int] = {}  # of the epochs that were planned

    def plan_of(self, epoch: int) -> Plan:
        """The packs of all ranks in an epoch."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._plan(epoch)
            self._iterations[epoch] = self._planned[1].iterations
        return self._planned[1]

    def _plan(self, epoch: int) -> Plan:
        data, shape = self._dataset, self.model_shape
        plan = plan_epoch(
            data.lengths,
            data.pair_counts,
            data.lengths if shape is None else shape.flops(data.lengths, data.attended),
            data.max_packed_length,
            pairs_per_step=self.pairs_per_step,
            seed=self._seed,
            epoch=epoch,
            ranks=get_world_size(),
            accumulation=self.accumulative_counts,
        )
        idle = np.count_nonzero(plan.pair_weights == 0) / len(plan.pair_weights)
        if epoch == 0 and idle > MOST_IDLE:
            logger.warning(
                "%.0f %% of the packs hold nothing new: there are too few groups for the %d packs "
                "of an optimizer step. Lower accumulative_counts, raise pairs_per_step, or set "
                "group_candidates=False",
                100 * idle,
                plan.ranks * plan.accumulation,
            )
        return plan

    def __len__(self) -> int:
        return self.iterations(1)

    def __iter__(self) -> Iterator[Pack]:
        """Packs from `start_iter` on, without end."""
        epoch, skip = 0, self.start_iter
        while True:
            plan = self.plan_of(epoch)
            for iteration in range(skip, plan.iterations):
                yield plan.pack(iteration, get_rank())
            epoch, skip = epoch + 1, max(0, skip - plan.iterations)

    def iterations(self, epochs: int) -> int:
        """Packs a rank goes through in that many epochs; packing differs a little by epoch."""
        for epoch in range(epochs):
            if epoch not in self._iterations:
                self.plan_of(epoch)
        return sum(self._iterations[epoch] for epoch in range(epochs))
