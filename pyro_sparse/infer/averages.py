"""Sums over minibatches that stand for sums over the data set, for closed-form updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_sparse.infer.callbacks import Progress
from pyro_sparse.infer.numbers import check_real, check_whole
from pyro_sparse.ops import check_tensor


class RunningAverage:
    """Sums averaged over steps, with weight ``step ** -decay`` for the newest."""

    def __init__(self, decay: float) -> None:
        check_real("decay", decay, 0.0, 1.0)
        self.decay = decay
        self.num_updates = 0
        self.sums: dict[str, Tensor] = {}

    def mixed(self, new: dict[str, Tensor], num_data: int) -> dict[str, Tensor]:
        """Old sums and those of a minibatch, of all processes together."""
        new = across_processes(new)
        if not self.sums or int(new["size"]) >= num_data:
            return new
        weight = (self.num_updates + 1) ** -self.decay
        return {name: torch.lerp(self.sums[name].to(v), v, weight) for name, v in new.items()}

    def keep(self, sums: dict[str, Tensor]) -> None:
        """Remember the sums that ``mixed`` gave."""
        self.sums = sums
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {"num_updates": self.num_updates, **self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.sums = {name: value for name, value in state.items() if name != "num_updates"}
        self.num_updates = int(state["num_updates"])


def across_processes(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the minibatches of all processes, so that all of them make the same update."""
    group = torch.distributed
    if group.is_available() and group.is_initialized():
        sums = {name: value.clone() for name, value in sums.items()}
        for value in sums.values():
            group.all_reduce(value)
    return sums


def encoded(progress: Progress) -> Tensor:
    """Codes of this step's minibatch, by the guide that is being trained."""
    encode = getattr(progress.guide, "encode", None)
    if encode is None:
        raise TypeError(
            f"Expected a guide with a method encode(y, mask), got {type(progress.guide).__name__}. "
            "Call update(codes, ...) from a callback of your own."
        )
    return encode(progress.y, progress.mask)


def data_size(codes: Tensor, num_data: int | None) -> int:
    """Size of the data set that the codes of a minibatch stand for."""
    check_tensor("codes", codes)
    if codes.dim() < 2 or len(codes) == 0:
        raise ValueError(
            f"Expected codes of shape (n, atoms, *positions) with n >= 1, got {tuple(codes.shape)}."
        )
    if num_data is not None:
        check_whole("num_data", num_data)
    if num_data is not None and num_data < len(codes):
        raise ValueError(f"Expected num_data >= {len(codes)} (the minibatch), got {num_data}.")
    return num_data or len(codes)
