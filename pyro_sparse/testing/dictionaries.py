"""Is a dictionary the linear map that solvers and guides take it for?"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sparse.dictionaries import Dictionary
from pyro_sparse.infer.findings import NotAsked
from pyro_sparse.testing.advice import Advice, Failed, gather
from pyro_sparse.testing.saving import check_saving

_TOLERANCE = 1e-4


def check_dictionary(dictionary: Dictionary, signal_shape: tuple[int, ...] | None = None) -> Advice:
    """Check a dictionary: shapes, linearity, adjoint, norm, gradient, other atoms, float64, saving.

    Torch's random state is left as it was.

    Args:
        dictionary: The dictionary.
        signal_shape: Shape of one datum; needed where the dictionary serves signals of any length.

    Returns:
        The findings; print them, or ``.raise_if_failed()`` in a test.

    Raises:
        TypeError: If it is no ``Dictionary``.
        ValueError: If ``signal_shape`` is needed and not given, or does not fit.

    Example:
        >>> from pyro_sparse.dictionaries import Conv
        >>> check_dictionary(Conv(3, 1, 5), signal_shape=(1, 20)).ok
        True
    """
    if not isinstance(dictionary, Dictionary):
        raise TypeError(f"Expected a Dictionary, got {type(dictionary).__name__}.")
    shape = dictionary.signal_shape if signal_shape is None else tuple(signal_shape)
    if shape is None:
        raise ValueError(
            "Expected signal_shape=(channels, *lengths): this dictionary serves signals of any "
            "length."
        )
    codes = tuple(dictionary.code_shape(shape))
    like = dictionary.like
    with torch.random.fork_rng():
        z = torch.randn(2, 3, *codes).to(like)
        y = torch.randn(2, 3, *shape).to(like)
        return gather(
            type(dictionary).__name__.removeprefix("Parametrized"),
            {
                "shapes": lambda: _shapes(dictionary, z, y),
                "linear": lambda: _linear(dictionary, z),
                "adjoint": lambda: _adjoint(dictionary, z, y),
                "squared norm": lambda: _norm(dictionary, z),
                "gradient": lambda: _gradient(dictionary, z),
                "bind": lambda: _bind(dictionary, z),
                "double": lambda: _double(dictionary, z, y),
                "save and load": lambda: check_saving(dictionary),
            },
        )


def _shapes(dictionary: Dictionary, z: Tensor, y: Tensor) -> str:
    if dictionary.code_dims != z.dim() - 2 or dictionary.signal_dims != y.dim() - 2:
        raise Failed(
            f"Expected code_dims = {z.dim() - 2} and signal_dims = {y.dim() - 2}, of one datum's "
            f"codes and signal, got {dictionary.code_dims} and {dictionary.signal_dims}."
        )
    if z.shape[2] != dictionary.num_atoms or dictionary.atoms.shape[0] != dictionary.num_atoms:
        raise Failed(
            f"Expected num_atoms = {dictionary.num_atoms} first in codes and atoms, got "
            f"{tuple(z.shape[2:])} and {tuple(dictionary.atoms.shape)}."
        )
    for name, got, expected in (
        ("forward", dictionary(z).shape, y.shape),
        ("adjoint", dictionary.adjoint(y).shape, z.shape),
    ):
        if got != expected:
            raise Failed(
                f"Expected {name} to keep leading dimensions and give {tuple(expected)}, got "
                f"{tuple(got)}."
            )
    return f"codes {tuple(z.shape[2:])}, signal {tuple(y.shape[2:])}"


@torch.no_grad()
def _linear(dictionary: Dictionary, z: Tensor) -> str:
    first, second = z[0], z[1]
    got = dictionary(2 * first - 3 * second)
    _compare(
        got, 2 * dictionary(first) - 3 * dictionary(second),
        "forward() is not linear: put offsets into likelihoods.Offset, and a non-linear decoder "
        "into models.DeepSparseCoding",
    )  # fmt: skip
    return "within rounding"


@torch.no_grad()
def _adjoint(dictionary: Dictionary, z: Tensor, y: Tensor) -> str:
    left, right = (dictionary(z) * y).sum(), (z * dictionary.adjoint(y)).sum()
    size = dictionary(z).norm() * y.norm()
    if not float((left - right).abs()) <= _TOLERANCE * float(size):
        raise Failed(
            f"Expected <forward(z), y> = <z, adjoint(y)>, got {float(left):.6g} and "
            f"{float(right):.6g}. The transposed map of what forward() does, with its stride, "
            "flips and edges; autograd of forward() gives one to compare with."
        )
    return "<Dz, y> = <z, D'y>"


def _norm(dictionary: Dictionary, z: Tensor) -> str:
    with torch.no_grad():
        bound = dictionary.squared_norm(tuple(dictionary(z).shape[2:]))
        direction = z[0, :1]
        for _ in range(100):
            direction = dictionary.adjoint(dictionary(direction))
            direction = direction / direction.norm()
        true = float(dictionary(direction).square().sum())
    if bound.requires_grad or bound.dim():
        raise Failed(f"Expected a detached scalar, got {bound!r}.")
    if not true <= float(bound) * (1 + _TOLERANCE):
        raise Failed(
            f"Expected an upper bound of the largest squared singular value, at least {true:.6g} "
            f"by power iteration, got {float(bound):.6g}. Steps of one over it would diverge."
        )
    return f"{float(bound):.4g}, true at least {true:.4g}"


def _gradient(dictionary: Dictionary, z: Tensor) -> str:
    moving = [p for p in dictionary.parameters() if p.requires_grad]
    if not moving:
        raise NotAsked("No parameter requires a gradient: a fixed dictionary.")
    weight = torch.randn_like(dictionary(z))
    gradients = torch.autograd.grad((dictionary(z) * weight).sum(), moving, allow_unused=True)
    if any(g is None or not bool(torch.isfinite(g).all()) for g in gradients):
        raise Failed(
            "Expected a finite gradient of every parameter through forward(), got none for some. "
            "Read self.atoms inside bind(), without detach or no_grad."
        )
    return f"reaches {len(moving)} parameters"


def _bind(dictionary: Dictionary, z: Tensor) -> str:
    with torch.no_grad():
        _compare(
            dictionary.bind(dictionary.atoms).forward(z), dictionary(z),
            "bind(atoms) with the module's own atoms is the module's own map",
        )  # fmt: skip
        other = dictionary.bind(2 * dictionary.atoms).forward(z)
        _compare(
            other, 2 * dictionary(z),
            "bind(atoms) must use what it is given, as it is: a sampled dictionary comes this way",
        )  # fmt: skip
    return "uses the atoms that it is given"


@torch.no_grad()
def _double(dictionary: Dictionary, z: Tensor, y: Tensor) -> str:
    bound = dictionary.bind()
    try:
        exact = bound.double()
    except NotImplementedError:
        raise NotAsked(
            "None: solvers.solve needs it to certify codes, and exact posteriors to read atoms."
        ) from None
    codes, signal = z.double(), y.double()
    forward, adjoint = exact.forward(codes), exact.adjoint(signal)
    for name, made in (("forward", forward), ("adjoint", adjoint)):
        if made.dtype != torch.float64:
            raise Failed(
                f"Expected bind().double().{name} to give float64, got {made.dtype}: convert every "
                "tensor that the map holds, kernels and operators as well as atoms."
            )
    _compare(forward.to(z.dtype), dictionary(z), "bind().double() is the same map, in float64")
    _compare(
        adjoint.to(y.dtype), dictionary.adjoint(y), "bind().double() is the same map, in float64"
    )
    # Sums in another order: a thousand rounding units, as solve allows for.
    size = forward.norm() * signal.norm() + codes.norm() * adjoint.norm()
    slack = 1e3 * bound.rounding() * float(size)
    off = float(((forward * signal).sum() - (codes * adjoint).sum()).abs())
    if not off <= slack:
        raise Failed(
            f"Expected <forward(z), y> = <z, adjoint(y)> of bind().double() within {slack:.3g}, "
            f"got a difference of {off:.3g}: something in it still works in a coarser precision. "
            "A map that cannot be widened says so by rounding()."
        )
    return f"the same map, rounding {bound.rounding():.1g}"


def _compare(got: Tensor, expected: Tensor, meaning: str) -> None:
    error = (got - expected).norm() / (1e-12 + expected.norm())
    if not float(error) <= _TOLERANCE:
        raise Failed(f"A relative difference of {float(error):.3g}: {meaning}.")
