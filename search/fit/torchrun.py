"""Several workers that train one network: this process among those that `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from tvm_lowrank import console
from tvm_lowrank.data.training_data import Batch

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # that workers wait for the first one, which searches while they wait


@dataclass(frozen=True)
class Workers:
    """This process among those that `torchrun` started."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def share(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batch i of worker i mod n; batches at the end that do not give one to every worker are left out."""
        remaining = iter(batches)
        while len(group := list(islice(remaining, self.count))) == self.count:
            yield group[self.rank]

    def average(self, loss: Tensor, parameters: Sequence[Tensor]) -> float:
        """Replace the gradients by their mean over the workers; returns that of the loss."""
        if self.count > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([loss.reshape(1), *(g.reshape(-1) for g in gradients)])
            distributed.all_reduce(flat)
            flat /= self.count
            loss, *means = flat.split([1, *(g.numel() for g in gradients)])
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean.view(gradient.shape))
        return float(loss)

    def of_first(self, compute: Callable[[], T]) -> T:
        """What `compute` returns to the first worker, for all."""
        if self.count == 1:
            return compute()
        holder: list[Any] = [compute() if self.rank == 0 else None]
        distributed.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
        return holder[0]

    def only_first(self, act: Callable[[], object]) -> None:
        if self.rank == 0:
            act()

    def say(self, text: str) -> None:
        self.only_first(lambda: console.phase(text))

    def warn(self, text: str) -> None:
        self.only_first(lambda: console.warn(text))

    def progress(self, description: str, total: float) -> AbstractContextManager[console.Advance]:
        if self.rank == 0:
            return console.progress(description, total)
        return nullcontext(lambda units=1, /, *, description=None: None)


@contextmanager
def joined() -> Iterator[Workers]:
    """The workers that `torchrun` started, or this process alone; on a GPU where there is one."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Workers(device=device)
        return
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        yield Workers(distributed.get_rank(), distributed.get_world_size(), device)
        distributed.all_reduce(torch.zeros(1))  # nobody leaves while another still reads from it
    finally:
        distributed.destroy_process_group()
