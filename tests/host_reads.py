"""Counting what makes the host wait for a tensor's value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
"""What `item`, `float`, `bool`, `int`, `if tensor` and `torch.equal` come down to."""
SHAPED_BY_VALUES = (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default)
"""Their result's shape follows from the values: on a GPU the host waits for it."""
COPIES = ("tolist", "cpu", "numpy")
"""On a GPU they copy to the host; on a CPU no operation shows it."""


class HostReads(TorchDispatchMode):
    """`count` goes up with each read of a tensor that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Indexing with a boolean mask looks for the places that are True.
        by_mask = func is torch.ops.aten.index.Tensor and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        self.count += func in READS or func in SHAPED_BY_VALUES or by_mask
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads(*, copies: tuple[str, ...] = COPIES) -> Iterator[HostReads]:
    """Count the reads of this thread within; `copies` are the methods that count as one."""
    with HostReads() as reads, mock.patch.multiple(torch.Tensor, **_counted(reads, copies)):
        yield reads


def _counted(reads: HostReads, names: tuple[str, ...]) -> dict[str, Any]:
    def counted(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            reads.count += 1
            return method(*args, **kwargs)

        return call

    return {name: counted(getattr(torch.Tensor, name)) for name in names}
