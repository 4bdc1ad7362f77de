"""Encoders: from data to the unconstrained parameters of a posterior, by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pyro_sparse.dictionaries import Dictionary, LinearMap
from pyro_sparse.dictionaries.base import check_shape, check_sizes
from pyro_sparse.distributions import Law, check_prior, codes_prior
from pyro_sparse.distributions.gaussian_tail import log_tail
from pyro_sparse.infer.bundle import register_savable
from pyro_sparse.infer.numbers import check_real
from pyro_sparse.ops import check_tensor
from pyro_sparse.solvers import Unrolled
from pyro_sparse.solvers.problem import Problem


class Heads(nn.Module):
    """A network and one linear head for each parameter of the posterior.

    Args:
        network: Maps data ``(n, *signal_shape)`` to features ``(n, num_features)``; a convolutional
            one ends in ``nn.Flatten()``. Samples that were not observed reach it as zeros.
        num_features: Width of its output.
        code_shape: Shape of one datum's codes: ``num_atoms``, or ``(atoms, *positions)``.
        names: Parameters to emit: the ``names`` of a posterior, such as
            ``SpikeAndSlabPosterior().names`` (default).

    Raises:
        TypeError: If ``network`` is no module, or a name no string.
        ValueError: If a size is not positive, or ``names`` are no names for parts of a module, each
            once.

    References:
        Fallah & Rozell (2022), ICML, PMLR 162:6034-6058: an MLP 256-512-1024-512-256 with a linear
        head per parameter.

    Example:
        >>> network = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten())
        >>> emitted = Heads(network, 4 * 8, code_shape=(2, 7))(torch.randn(3, 1, 10))
        >>> {name: tuple(values.shape) for name, values in emitted.items()}
        {'loc': (3, 2, 7), 'log_scale': (3, 2, 7), 'logits': (3, 2, 7)}
    """

    def __init__(
        self,
        network: nn.Module,
        num_features: int,
        code_shape: int | tuple[int, ...],
        names: Sequence[str] = ("loc", "log_scale", "logits"),
    ) -> None:
        super().__init__()
        shape = (code_shape,) if isinstance(code_shape, int) else check_shape(code_shape)
        check_sizes(num_features=num_features, code_shape=shape)
        if not isinstance(network, nn.Module):
            raise TypeError(f"Expected network to be a module, got {type(network).__name__}.")
        if isinstance(names, str) or not names or len(set(names)) != len(names):
            raise ValueError(f"Expected different names of parameters, got {names!r}.")
        _check_parts(names)
        self.network = network
        self.num_features = num_features
        self.code_shape = shape
        self.names = tuple(names)
        size = math.prod(shape)
        self.heads = nn.ModuleDict({name: nn.Linear(num_features, size) for name in self.names})

    def forward(self, y: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Parameters of the posterior of each datum, ``(n, *code_shape)`` each.

        Raises:
            ValueError: If the network does not take data of this shape, or its output has another
                shape than ``(n, num_features)``.
        """
        try:
            features = self.network(y)
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # a full memory, say
                raise
            raise ValueError(
                f"Expected data that the network takes, got shape {tuple(y.shape)}, on which it "
                f"fails: {error}"
            ) from error
        if tuple(features.shape) != (len(y), self.num_features):
            raise ValueError(
                f"Expected features of shape (n, num_features) = ({len(y)}, {self.num_features}) "
                f"from the network, got {tuple(features.shape)}. A convolutional network ends in "
                "nn.Flatten()."
            )
        return {
            name: head(features).reshape(-1, *self.code_shape) for name, head in self.heads.items()
        }


class UnrolledEncoder(nn.Module):
    r"""Location, scale and inclusion from an unrolled solver.

    The solver's codes :math:`\hat z` are thresholded, so small ones are lost and large ones are
    shrunk. What is emitted undoes that by one step of coordinate ascent for all codes at once: the
    posterior of each given all others at :math:`\hat z`. With the score :math:`r` of the data
    there, and :math:`\rho_k = c \sum_d a_{kd}^2` over the observed samples (:math:`c` the
    likelihood's curvature),

    .. math::
        S_k &= (\rho_k + \tau_k^{-2})^{-1}, \qquad
        \mu_k = S_k (\rho_k \hat z_k + \gamma_k\, a_k^T r), \qquad
        b_k = e^{\beta_k} \sqrt{S_k}, \\
        \operatorname{logit} g_k &= \alpha_k + \tfrac{\kappa_k}{2} \Big(\log
            \frac{S_k}{\tau_k^2} + \frac{\mu_k^2}{S_k}\Big)

    with :math:`\gamma, \beta, \alpha, \kappa, \tau` learned for each atom, from 1, 0, the
    log-odds of ``init_probs``, 1 and ``init_scale``. With the model's inclusion and slab there,
    this is exact for one Gaussian code, and useful for many before any training. A code that
    reaches no observed sample gets its prior back.

    The slab that is meant is normal, with mean zero. For codes that are not negative
    (``one_sided=True``) it is the positive half of that, and the evidence for an active code, which
    :math:`\kappa_k` multiplies, does not count how well negative ones would fit:

    .. math:: \frac12 \Big(\log \frac{S_k}{\tau_k^2} + \frac{\mu_k^2}{S_k}\Big)
        + \log 2 \Phi\Big(\frac{\mu_k}{\sqrt{S_k}}\Big).

    Of another slab, with a mean of its own or exponential, the shift of :math:`\mu_k` towards it is
    left out: of one code the emitted law is then near the posterior and not the posterior, and
    ``refine`` finds it.

    Args:
        unrolled: The solver, on the model's dictionary or weights of its own. (A dictionary that
            the model samples is no place for it: the solver would see the atoms it started from.)
        prior: Prior of the solver's proximal step, such as ``dist.Laplace(0.0, 0.1)``: it decides
            how sparse :math:`\hat z` is. A mixed prior has no proximal step.
        init_probs: Inclusion of a code before the data, at the start, in (0, 1); best that of the
            model's prior.
        init_scale: Standard deviation of an active code, likewise, ``> 0``, in code units; if
            one-sided, its root mean square.
        one_sided: Codes are not negative: for ``SpikeAndSlabPosterior(one_sided=True)`` or one with
            an exponential slab.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``init_probs`` or ``init_scale`` is out of range.

    References:
        Titsias & Lazaro-Gredilla (2011), NeurIPS 24 (the coordinate-wise posterior); Gregor &
        LeCun (2010), ICML.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.dictionaries import Dense
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> solver = Unrolled(Dense(8, 5), Gaussian(0.1), num_steps=5)
        >>> encoder = UnrolledEncoder(solver, dist.Laplace(0.0, 0.2), init_probs=0.2)
        >>> encoder(torch.randn(3, 5))["logits"].shape
        torch.Size([3, 8])
    """

    names = ("loc", "log_scale", "logits", "codes")

    def __init__(
        self,
        unrolled: Unrolled,
        prior: Law,
        *,
        init_probs: float = 0.1,
        init_scale: float = 1.0,
        one_sided: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(unrolled, Unrolled):
            raise TypeError(
                "Expected unrolled to be solvers.Unrolled(dictionary, likelihood, ...), got "
                f"{type(unrolled).__name__}. A guide UnrolledFISTA holds one: guide.encoder."
            )
        check_prior(prior, has_rate=False)
        check_real("init_probs", init_probs, 0.0, 1.0, open_low=True)
        check_real("init_scale", init_scale, 0.0, math.inf, open_low=True)
        if init_probs == 1 or init_scale == math.inf:
            raise ValueError(
                f"Expected init_probs < 1 and a finite init_scale, got {init_probs}, {init_scale}."
            )
        self.unrolled = unrolled
        # A name of its own: Pyro's store would take equal paths in model and guide for one.
        self.encoder_prior = prior
        self.init_probs = init_probs
        self.init_scale = init_scale
        self.one_sided = one_sided
        like, count = unrolled.dictionary.like, unrolled.dictionary.num_atoms
        self.gain = nn.Parameter(like.new_ones(count))
        self.log_factor = nn.Parameter(like.new_zeros(count))
        self.bias = nn.Parameter(like.new_full((count,), math.log(init_probs / (1 - init_probs))))
        self.slope = nn.Parameter(like.new_ones(count))
        self.log_slab = nn.Parameter(like.new_full((count,), math.log(init_scale)))

    def forward(self, y: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Parameters of the posterior of each datum, ``(n, atoms, *positions)`` each.

        Among them ``"codes"``, those of the solver: the law of each code is that given all others
        at these values, which ``StructuredThresholded`` has to know.
        """
        unrolled, dictionary = self.unrolled, self.unrolled.dictionary
        shape = tuple(dictionary.code_shape(tuple(y.shape))[1:])
        law = codes_prior(self.encoder_prior, None, shape, like=y)
        codes = unrolled(y, law, mask=mask)
        synthesis = (unrolled.synthesis or dictionary).bind()
        analysis = synthesis if unrolled.analysis is None else unrolled.analysis.bind()
        problem = Problem(
            y, synthesis, analysis, unrolled.likelihood, law, dictionary.signal_dims, mask
        )
        correlation = analysis.adjoint(problem.score(synthesis.forward(codes)))
        curvature = unrolled.likelihood.curvature(y)
        energy = _energy(dictionary, synthesis, y, mask, curvature)

        positions = [1] * (len(shape) - 1)
        gain, log_factor, bias, slope, log_slab = (
            values.reshape(-1, *positions)
            for values in (self.gain, self.log_factor, self.bias, self.slope, self.log_slab)
        )
        log_ratio = -torch.log1p(energy * (2 * log_slab).exp())  # log S / tau^2
        log_variance = log_ratio + 2 * log_slab
        loc = log_variance.exp() * (energy * codes + gain * correlation)
        evidence = (log_ratio + loc.square() * (-log_variance).exp()) / 2
        if self.one_sided:  # far below zero the square and the logarithm cancel: in one function
            evidence = log_ratio / 2 + log_tail(loc * (-log_variance / 2).exp()) + math.log(2)
        log_scale = log_factor + log_variance / 2
        return {
            "loc": loc,
            "log_scale": log_scale.expand_as(loc),
            "logits": bias + slope * evidence,
            "codes": codes,
        }


class PerDatum(nn.Module):
    """Parameters of their own for every datum of one data set: no encoder, but what stands in one.

    ``refine`` of a guide makes it. It takes all of its data at once, in their order: a minibatch
    has no index by which its data could be told.

    Args:
        parameters: Starting values by name, each ``(n, atoms, *positions)``.

    Raises:
        TypeError: If ``parameters`` is no dict from name to floating tensor.
        ValueError: If they are not of one shape, or a name is none for a part of a module.

    Example:
        >>> from pyro_sparse.guides import DensePosterior, Thresholded
        >>> start = {"loc": torch.zeros(3, 8), "log_scale": torch.zeros(3, 8)}
        >>> Thresholded(PerDatum(start), DensePosterior())(torch.randn(3, 5)).shape
        torch.Size([3, 8])
    """

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        if not isinstance(parameters, dict):
            raise TypeError(
                "Expected parameters to be a dict from name to tensor, such as {'loc': ...}, got "
                f"{type(parameters).__name__}."
            )
        _check_parts(parameters)
        for name, values in parameters.items():
            check_tensor(name, values)
        shapes = {name: tuple(values.shape) for name, values in parameters.items()}
        if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) < 2:
            raise ValueError(f"Expected parameters (n, atoms, *positions) alike, got {shapes}.")
        self.names = tuple(parameters)
        self.emitted = nn.ParameterDict(
            {name: nn.Parameter(values.detach().clone()) for name, values in parameters.items()}
        )

    def forward(self, y: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The parameters.

        Raises:
            ValueError: If ``y`` is not as long as they are.
        """
        emitted = dict(self.emitted.items())
        size = len(emitted[self.names[0]])
        if len(y) != size:
            raise ValueError(
                f"Expected the {size} data that this posterior belongs to, got {len(y)}."
            )
        return emitted


def _check_parts(names: Iterable[object]) -> None:
    """Refuse names that a module cannot give to its parts."""
    taken = nn.ModuleDict()
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"Expected names of parameters as strings, got {name!r}.")
        if not name or "." in name or hasattr(taken, name):
            raise ValueError(
                f"Expected names of parameters without dots that no module has taken, got {name!r}."
                " Try SpikeAndSlabPosterior().names."
            )


def _energy(
    dictionary: Dictionary,
    synthesis: LinearMap,
    y: Tensor,
    mask: Tensor | None,
    curvature: Tensor,
) -> Tensor:
    """Curvature that the observed samples give each code; broadcasts to the codes."""
    # One weighting for all data, unless they differ in what was observed or in their curvature.
    apart = mask is not None or curvature.dim() == y.dim()
    weight = curvature.to(y).expand(y.shape if apart else y[:1].shape)
    if mask is not None:
        weight = weight * mask
    try:
        return synthesis.squared().adjoint(weight)
    except NotImplementedError:  # only products are known, as of a composition
        norms = dictionary.atoms.flatten(1).square().sum(1)
        norms = norms.reshape(-1, *[1] * (dictionary.code_dims - 1))
        largest = curvature.to(y).max()
        return largest * norms


def _heads(
    network: nn.Module,
    weights: dict[str, Tensor],
    code_shape: tuple[int, ...],
) -> Heads:
    """Heads of a saved record: sizes from stored tensors, which a file cannot exceed."""
    shapes = {tuple(weight.shape) for weight in weights.values()}
    distinct = len({id(weight) for weight in weights.values()}) == len(weights)
    if len(shapes) != 1 or not distinct:
        raise ValueError(f"Expected different weights of one shape, got {sorted(shapes)}.")
    size, num_features = shapes.pop()
    if size != math.prod(code_shape):
        raise ValueError(f"Expected {size} codes, got the shape {code_shape}.")
    made = Heads(network, num_features, code_shape, tuple(weights))
    made.heads.to(next(iter(weights.values())).dtype)
    return made


register_savable(
    Heads,
    name="pyro_sparse.guides.Heads",
    arguments=lambda heads: {
        "network": heads.network,
        "weights": {name: head.weight.detach() for name, head in heads.heads.items()},
        "code_shape": heads.code_shape,
    },
    build=_heads,
)
register_savable(
    UnrolledEncoder,
    name="pyro_sparse.guides.UnrolledEncoder",
    arguments=lambda encoder: {
        "unrolled": encoder.unrolled,
        "prior": encoder.encoder_prior,
        "init_probs": encoder.init_probs,
        "init_scale": encoder.init_scale,
        "one_sided": encoder.one_sided,
    },
)
register_savable(
    PerDatum,
    name="pyro_sparse.guides.PerDatum",
    arguments=lambda table: {
        "parameters": {name: values.detach() for name, values in table.emitted.items()}
    },
)
