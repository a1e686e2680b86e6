"""Plan -> this rank's packs: the sampler that a dataloader follows."""

from __future__ import annotations

from polar_xtuner import compat  # noqa: F401  # isort: skip  (first: it checks versions)

from collections.abc import Iterator

from mmengine.dist import get_rank, get_world_size
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from polar_xtuner.dataset import PolarDataset
from polar_xtuner.packing import Pack, plan_epoch


@DATA_SAMPLERS.register_module()
class PackSampler(Sampler[Pack]):
    """This rank's packs, epoch after epoch, from any iteration on.

    Args:
        dataset: whose groups are planned.
        accumulative_counts: packs a rank adds up before the optimizer steps.
        seed: of the plan; the runner gives its own.
    """

    def __init__(self, dataset: PolarDataset, accumulative_counts: int = 1, seed: int = 0) -> None:
        self.accumulative_counts = accumulative_counts
        self.start_iter = 0
        self._dataset = dataset
        self._seed = seed
        self._planned: tuple[int, list[Pack]] = (0, self._plan(0))

    def packs_of(self, epoch: int) -> list[Pack]:
        """This rank's packs of an epoch, in order."""
        if self._planned[0] != epoch:
            self._planned = epoch, self._plan(epoch)
        return self._planned[1]

    def _plan(self, epoch: int) -> list[Pack]:
        plan = plan_epoch(
            self._dataset.lengths,
            self._dataset.pair_counts,
            self._dataset.max_packed_length,
            seed=self._seed,
            epoch=epoch,
            ranks=get_world_size(),
            accumulation=self.accumulative_counts,
        )
        return [slot[get_rank()] for step in plan for slot in step]

    def __len__(self) -> int:
        return self.iterations(1)

    def __iter__(self) -> Iterator[Pack]:
        """Packs from `start_iter` on, without end."""
        epoch, skip = 0, self.start_iter
        while True:
            packs = self.packs_of(epoch)
            yield from packs[skip:]
            epoch, skip = epoch + 1, max(0, skip - len(packs))

    def iterations(self, epochs: int) -> int:
        """Packs a rank goes through in that many epochs; packing differs a little by epoch."""
        return sum(len(self.packs_of(epoch)) for epoch in range(epochs))
