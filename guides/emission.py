"""What amortised guides ask of an encoder, and of the guide of the other sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pyro_sparse.likelihoods import check_data


def check_parts(encoder: Any, rest: Any, names: Sequence[str]) -> None:
    """Refuse what is no encoder of these parameters, or no guide of the other sites.

    Raises:
        TypeError: If ``encoder`` is no module, or ``rest`` is neither None nor callable.
        ValueError: If ``encoder`` states ``names`` and lacks one.
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"Expected encoder to be a module, got {type(encoder).__name__}.")
    if rest is not None and not callable(rest):
        raise TypeError(
            "Expected rest to be a guide of the other sites, such as an AutoNormal, got "
            f"{type(rest).__name__}."
        )
    stated = getattr(encoder, "names", None)
    if stated is not None:
        _check_names(stated, names)


def emit(
    encoder: nn.Module,
    y: Tensor,
    mask: Tensor | None,
    names: Sequence[str],
    *,
    like: Tensor | None,
    num_data: int | None = None,
    optional: Sequence[str] = (),
) -> dict[str, Tensor]:
    """What an encoder emits for a batch, checked to be tensors of one shape.

    Args:
        encoder: Maps ``(y, mask)`` to a dict.
        y: Data, shape ``(n, *signal_shape)``.
        mask: True where a sample was observed.
        names: Parameters that it has to emit.
        like: A tensor of the dtype and device that the data must have; None asks for none.
        num_data: Size of the whole data set; checked, and otherwise without effect.
        optional: Parameters that it may emit, which then are checked likewise.

    Raises:
        TypeError: If ``y`` is not a floating tensor of the parameters' dtype, or something else
            than a dict of tensors comes back.
        RuntimeError: If ``y`` is on another device.
        ValueError: If a parameter is missing, or has another shape.
    """
    dims = y.dim() - 1 if isinstance(y, Tensor) else 1
    y, mask = check_data(y, mask, num_data, max(dims, 1), like)
    parameters = encoder(y, mask)
    if not isinstance(parameters, dict):
        raise TypeError(
            "Expected the encoder to return a dict from parameter name to tensor, got "
            f"{type(parameters).__name__}. Heads(network, ...) makes one of a network."
        )
    _check_names(parameters, names)
    checked = [*names, *(name for name in optional if name in parameters)]
    for name in checked:
        if not isinstance(parameters[name], Tensor):
            raise TypeError(
                f"Expected {name!r} to be a tensor, got {type(parameters[name]).__name__}."
            )
    shapes = {name: tuple(parameters[name].shape) for name in checked}
    shape = next(iter(shapes.values()))
    if len(set(shapes.values())) != 1 or len(shape) < 2 or shape[0] != len(y):
        raise ValueError(
            f"Expected parameters of one shape (n={len(y)}, atoms, *positions), got {shapes}."
        )
    return parameters


def _check_names(emitted: Any, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in emitted]
    if missing:
        raise ValueError(
            f"Expected the encoder to emit {list(names)}, but {missing} are missing: it emits "
            f"{sorted(emitted)}. Heads takes names=family.names."
        )
