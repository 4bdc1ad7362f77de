"""An unrolled encoder for any Pyro program."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_sparse.guides.packing import CodeSite
from pyro_sparse.guides.traced import Recorded, Traced
from pyro_sparse.infer.bundle import register_savable
from pyro_sparse.infer.numbers import check_whole
from pyro_sparse.infer.store import claim_names
from pyro_sparse.solvers import FISTA, Backtracking, Fixed, Method, StepSize


class AutoUnrolled(PyroModule):
    r"""MAP codes of any Pyro program, by proximal-gradient steps on its own log-density.

    With :math:`z` all code sites of a datum and :math:`\theta` whatever else is latent, layer
    :math:`t` is

    .. math:: z_{t+1} = \mathrm{prox}_{-s \log p(z)}\big(w_t + s\, \nabla_z \log p(y \mid w_t,
        \theta)\big)

    from zero. The gradient is taken by autograd through the program, so any differentiable decoder
    and likelihood will do, and the layers are differentiable in its parameters: training moves a
    decoder through the encoder too. With enough steps the codes of a convex program are its MAP
    codes.

    Code sites are the latent sites that ``rest`` does not sample. Each needs a law with a
    registered ``prox`` that depends on no other code. They stand in any plates (subsampled
    ones too: the model then sees the same subsample) and have any event shape; data are the
    cells of the plates that all of them, and all data that depend on them, share. Scales and masks
    count as in the program; a subsample leaves the step as it is.

    Sites: each code site as a ``Delta`` in the plates that it has in the program, and those of
    ``rest``. As point estimates they have no spread. Called with the program's own arguments.

    The program may hold modules; they are the program's, not this guide's: it shows none of them
    among its own parameters, and a deep copy of the guide alone encodes for a copy of the program.

    Args:
        model: The program.
        rest: A guide of its other latent sites, such as ``AutoNormal(poutine.block(model,
            expose=["sigma"]))``. It is called first, with the same arguments, and returns a dict
            from site name to value, as Pyro's autoguides do.
        num_steps: Number of layers, ``>= 1``.
        method: ``solvers.FISTA()`` (default), or ``FISTA(restart=True)`` for many steps, or
            ``ISTA()``.
        step: ``Backtracking()`` (default), which is safe for any convex program;
            ``PowerIteration()``, which costs less where the log-likelihood is quadratic in the
            codes; or a number or tensor, as in ``Fixed``.
        learn_thresholds: Learn a factor on the threshold of each atom (each index of the first
            event dimension), starting from 1. Made at the first call, as in Pyro's autoguides.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If a number is out of its range.

    References:
        Gregor & LeCun (2010), ICML; Beck & Teboulle (2009), SIAM J. Imaging Sci. 2(1).

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> atoms = torch.randn(8, 5)
        >>> def model(counts):
        ...     with pyro.plate("spectra", len(counts)):
        ...         z = pyro.sample("z", dist.Exponential(torch.ones(8)).to_event(1))
        ...         pyro.sample("counts", dist.Poisson((z @ atoms).exp()).to_event(1), obs=counts)
        >>> guide = AutoUnrolled(model, num_steps=5)
        >>> guide(torch.ones(3, 5))["z"].shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        rest: Callable[..., dict[str, Tensor]] | None = None,
        num_steps: int = 15,
        method: Method | None = None,
        step: StepSize | float | Tensor | None = None,
        learn_thresholds: bool = False,
    ) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(f"Expected model to be a Pyro program, got {type(model).__name__}.")
        if rest is not None and not callable(rest):
            raise TypeError(
                "Expected rest to be a guide of the other sites, such as an AutoNormal, got "
                f"{type(rest).__name__}."
            )
        check_whole("num_steps", num_steps, 1)
        if not isinstance(method, Method | None):
            raise TypeError(f"Expected method to be a Method, such as FISTA(), got {method!r}.")
        if isinstance(step, Real | Tensor):
            step = Fixed(step)
        if not isinstance(step, StepSize | None):
            raise TypeError(
                "Expected step to be a StepSize, such as Backtracking(), a number or a tensor, got "
                f"{type(step).__name__}."
            )
        if not isinstance(learn_thresholds, bool):
            raise TypeError(f"Expected learn_thresholds as a bool, got {learn_thresholds!r}.")
        self._model = (model,)  # in a tuple it is no submodule: its parameters are its own
        self.rest = rest
        self.num_steps = num_steps
        self.method = FISTA() if method is None else method
        self.step = Backtracking() if step is None else step
        self.thresholds = _Thresholds() if learn_thresholds else None

    @property
    def model(self) -> Callable[..., Any]:
        """The program."""
        return self._model[0]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Run the guide.

        Args:
            args: The program's arguments.
            kwargs: Its keyword arguments.

        Returns:
            Values of all latent sites by name.

        Raises:
            ValueError: If a latent site can be no code site, or the program couples data that its
                plates call independent; names the sites.
        """
        claim_names(self)
        recorded = Recorded()
        with recorded:
            values = self._rest_values(args, kwargs)
        traced, codes = self._solve(args, kwargs, values, recorded.subsamples)
        traced.sample(codes)
        return {**values, **codes}

    def encode(
        self, *args: Any, rest_values: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Codes, without any sample statement.

        Args:
            args: The program's arguments.
            rest_values: Values of the other latent sites, such as ``guide.rest.median()``; by
                default ``rest`` draws them.
            kwargs: The program's keyword arguments.

        Returns:
            Values of the code sites by name, with exact zeros where the priors make them.

        Raises:
            TypeError: If ``rest_values`` is no dict.
            ValueError: As for a call.
        """
        recorded = Recorded()
        with poutine.block(hide_types=["sample"]), recorded:
            if rest_values is None:
                rest_values = self._rest_values(args, kwargs)
            _check_values("rest_values", rest_values)
            return self._solve(args, kwargs, rest_values, recorded.subsamples)[1]

    def _solve(
        self, args: Any, kwargs: Any, values: dict[str, Tensor], subsamples: dict[str, Any]
    ) -> tuple[Traced, dict[str, Tensor]]:
        traced = Traced(self.model, args, kwargs, values, subsamples)
        if self.thresholds is not None:
            self.thresholds.grow(traced.sites)
            thresholds = self.thresholds  # looked up again: Pyro registers what it now holds
            traced.weights = {site.name: thresholds.factor(site) for site in traced.sites}
        step = self.step.first(traced)
        state = self.method.start(traced.start)
        for _ in range(self.num_steps):
            assert state.point is not None
            codes, step = self.step.advance(traced, state.point, step)
            state = self.method.advance(state, codes, 1)
        assert state.codes is not None
        traced.check_laws_at(state.codes)
        return traced, traced.packing.unpack(state.codes)

    def _rest_values(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        if self.rest is None:
            return {}
        values = self.rest(*args, **kwargs)
        _check_values("rest to return", values)
        return values


class _Thresholds(nn.Module):
    """Factors on the thresholds of the atoms of code sites, made as the sites are met."""

    def grow(self, sites: tuple[CodeSite, ...]) -> None:
        """Make the factors of new sites, all one."""
        for site in sites:
            if not hasattr(self, _key(site.name)):
                shape = site.shape[len(site.batch_shape) :][:1]
                self.register_parameter(_key(site.name), nn.Parameter(site.like.new_zeros(shape)))

    def factor(self, site: CodeSite) -> Tensor:
        """Factors of a site, shaped to multiply its value."""
        log_factor: Tensor = getattr(self, _key(site.name))
        event = site.shape[len(site.batch_shape) :]
        if log_factor.shape != event[:1]:
            raise ValueError(
                f"Expected codes {site.name!r} of {tuple(log_factor.shape)} atoms, for which "
                f"thresholds were learned, got the event shape {tuple(event)}."
            )
        return log_factor.exp().reshape(*event[:1], *[1] * (site.event_dim - 1))


def _key(name: str) -> str:
    return "log_" + name.replace(".", "/")


def _check_values(what: str, values: object) -> None:
    if not isinstance(values, dict):
        raise TypeError(
            f"Expected {what} a dict from site name to value, as Pyro's autoguides do, got "
            f"{type(values).__name__}."
        )


def _build(log_thresholds: dict[str, Tensor] | None, **arguments: Any) -> AutoUnrolled:
    guide = AutoUnrolled(learn_thresholds=log_thresholds is not None, **arguments)
    for key, value in (log_thresholds or {}).items():
        assert guide.thresholds is not None
        guide.thresholds.register_parameter(key, nn.Parameter(value.clone()))
    return guide


def _arguments(guide: AutoUnrolled) -> dict[str, Any]:
    """What a saved guide is built from again: the program has to be of a registered class."""
    held = None
    if guide.thresholds is not None:
        held = {key: value.detach() for key, value in guide.thresholds.named_parameters()}
    named = ("model", "rest", "num_steps", "method", "step")
    return {"log_thresholds": held, **{name: getattr(guide, name) for name in named}}


register_savable(
    AutoUnrolled, name="pyro_sparse.guides.AutoUnrolled", arguments=_arguments, build=_build
)
