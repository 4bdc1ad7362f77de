"""What several processes have to agree on; each function does nothing where there is one."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


def rank_and_size() -> tuple[int, int]:
    """Number of this process and of all of them, ``(0, 1)`` outside a process group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def parallel(objective: nn.Module) -> nn.Module:
    """The objective with gradients averaged over all processes."""
    if rank_and_size()[1] == 1:
        return objective
    return DistributedDataParallel(objective, find_unused_parameters=True)


def share(local: int, total: int) -> float:
    """Weight of a process that read ``local`` of ``total`` rows, so that the mean is right."""
    return local * rank_and_size()[1] / total


def mean_over(value: Tensor) -> float:
    """Mean of a scalar over all processes."""
    size = rank_and_size()[1]
    if size == 1:
        return float(value)
    total = value.detach().clone()
    distributed.all_reduce(total)
    return float(total) / size


def gathered(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors of every process, by rank."""
    size = rank_and_size()[1]
    if size == 1:
        return [tensors]
    every: list[list[Tensor]] = [[] for _ in range(size)]
    for tensor in tensors:
        received = [torch.empty_like(tensor) for _ in range(size)]
        distributed.all_gather(received, tensor)
        for own, value in zip(every, received):
            own.append(value)
    return every


def all_of(flag: bool) -> bool:
    """Whether a flag is set in every process."""
    if rank_and_size()[1] == 1:
        return flag
    unset = torch.tensor(0.0 if flag else 1.0)
    distributed.all_reduce(unset)
    return float(unset) == 0.0
