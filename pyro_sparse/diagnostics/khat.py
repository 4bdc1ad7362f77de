"""Pareto-smoothed importance sampling for each datum, and leaving each datum out."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import arviz
import torch
import xarray as xr
from torch import Tensor

from pyro_sparse.infer.log_weights import LogWeights

_FEWEST = 21  # draws of which the fifth gives a tail of the five values that a fit takes
_DRAWN = ("chain", "draw")
_COLUMNS = 256  # fitted at once: bounds the memory at some 50 MB for 4000 draws


def khat(weights: LogWeights | xr.DataTree | Tensor) -> Tensor:
    r"""Pareto shape of the importance weights of each datum.

    The largest weights :math:`w` of a datum are taken for draws of a generalised Pareto law with
    tail :math:`P(w > t) \sim t^{-1 / \hat k}`. Below :math:`\min(1 - 1 / \log_{10} S, 0.7)` means
    reweighting :math:`S` draws of the guide to the posterior works, and more draws help; above 1
    the weights have no mean to be found. A mean-field guide of correlated codes may lie above 0.7
    and still serve: compare guides by it rather than gate on it.

    Each datum is judged by its own draws, so the figures do not depend on how many data there are.
    A single one of ``LogWeights.joint`` grows with their number, however good the guide.

    Args:
        weights: What ``infer.log_weights`` returns, of which the local part is taken; what
            ``diagnostics.to_datatree`` returns, with the group ``sample_stats``, where the same
            stands; or log-weights in nats, shape ``(num_samples, ...)``. At least 21 samples; 1000
            and more are sensible.

    Returns:
        Shape ``(n,)``, or that of ``weights`` without its first dimension; float64. Agrees with
        ``arviz.psislw`` except where most of the largest weights are exactly equal (no draw
        exceeds the start of the tail), as of an exact guide or where all codes are often zero:
        then there is no tail, and it is ``-inf``, not ``inf`` as there. ``inf``, as there, where no
        tail can be fitted since only one to four draws exceed its start: they carry all weight, or
        many draws tie just below them, as those without any active code do; and where all draws
        are impossible.

    Raises:
        TypeError: If ``weights`` are no log-weights.
        ValueError: If there are too few draws, one is ``nan`` or ``inf``, or the tree holds none.

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry (2024), J. Mach. Learn. Res. 25(72), sec. 3.2; Zhang &
        Stephens (2009), Technometrics 51(3).

    Example:
        >>> uniform = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
        >>> tails = -torch.tensor([0.5, 1.5]) * uniform.log()  # log of Pareto draws
        >>> khat(tails) > 0.7
        tensor([False,  True])
    """
    return psis(weights)[1]


def psis(log_ratios: LogWeights | xr.DataTree | Tensor) -> tuple[Tensor, Tensor]:
    """Smooth the largest importance ratios of each column by a fitted Pareto tail.

    Args:
        log_ratios: Nats, shape ``(num_samples, ...)``, at least 21 samples; ``-inf`` for a ratio of
            zero. Or log-weights as ``khat`` takes them, ``(num_samples, n)`` then.

    Returns:
        Normalised log-weights, whose exponentials sum to 1 over the samples, shape of
        ``log_ratios``; and the fitted shapes, without its first dimension. Both float64. As
        ``arviz.psislw``, except for the ties that ``khat`` names.

    Raises:
        TypeError: If the ratios are neither a real tensor nor log-weights.
        ValueError: If there are too few draws, one is ``nan`` or ``inf``, or a tree holds none.

    References:
        Vehtari et al. (2024), J. Mach. Learn. Res. 25(72), algorithm 1.

    Example:
        >>> smoothed, shape = psis(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
        >>> smoothed.logsumexp(0).abs() < 1e-9
        tensor(True)
    """
    if isinstance(log_ratios, LogWeights):
        log_ratios = log_ratios.local
    elif isinstance(log_ratios, xr.DataTree):
        log_ratios = _of_tree(log_ratios)
    if not isinstance(log_ratios, Tensor) or log_ratios.is_complex():
        kind = log_ratios.dtype if isinstance(log_ratios, Tensor) else type(log_ratios).__name__
        raise TypeError(
            "Expected log-weights as a real tensor, or what infer.log_weights or "
            f"diagnostics.to_datatree returns, got {kind}."
        )
    if log_ratios.dim() == 0 or len(log_ratios) < _FEWEST:
        raise ValueError(
            f"Expected log-weights of shape (num_samples, ...) with at least {_FEWEST} samples, "
            f"got {tuple(log_ratios.shape)}. Raise num_samples; 1000 are sensible."
        )
    ratios = log_ratios.detach().double()
    bad = ratios.isnan() | (ratios == math.inf)
    if bool(bad.any()):
        raise ValueError(
            f"Expected log-weights below infinity, got {int(bad.sum())} that are nan or inf, the "
            f"first at {tuple(bad.nonzero()[0].tolist())}."
        )
    columns = ratios.flatten(1) if ratios.dim() > 1 else ratios[:, None]
    parts = [_smooth(part.T) for part in columns.split(_COLUMNS, dim=1)]
    if not parts:
        return ratios.clone(), ratios.new_empty(ratios.shape[1:])
    smoothed = torch.cat([part[0] for part in parts]).T.reshape(ratios.shape)
    return smoothed, torch.cat([part[1] for part in parts]).reshape(ratios.shape[1:])


def _of_tree(tree: xr.DataTree) -> Tensor:
    """Log-weights of each datum, shape ``(num_samples, n)``."""
    if "sample_stats" not in tree.children or "log_weight" not in tree["sample_stats"]:
        raise ValueError(
            "Expected a tree with sample_stats and log_weight in it, got groups "
            f"{list(tree.children)}. Leave groups= of to_datatree out, or put sample_stats in."
        )
    weight = tree["sample_stats"].to_dataset()["log_weight"].transpose(*_DRAWN, ...)
    return torch.from_numpy(weight.values).flatten(0, 1)


def _smooth(ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Of log-ratios ``(columns, samples)``."""
    columns, samples = ratios.shape
    length = math.ceil(min(samples / 5, 3 * samples**0.5))
    top = ratios.amax(1, keepdim=True)
    possible = top > -math.inf
    x = torch.where(possible, ratios - torch.where(possible, top, 0.0), 0.0)
    largest, where = x.topk(length + 1, dim=1)
    lowest = math.log(torch.finfo(torch.float64).tiny)
    largest, where = largest.flip(1), where.flip(1)  # ascending, the cutoff first
    cutoff = largest[:, :1].clamp(min=lowest)
    counts = (largest > cutoff).sum(1)  # fewer than the tail's length where values tie
    shape = torch.where(counts == 0, -math.inf, math.inf).double()
    shape = torch.where(possible[:, 0], shape, math.inf)
    for count in counts.unique().tolist():
        if count <= 4:
            continue
        rows = (counts == count).nonzero()[:, 0]
        excess = largest[rows, -count:].exp() - cutoff[rows].exp()
        k, sigma = _fit(excess)
        shape[rows] = k
        # Order statistics in place of the values, no larger than the largest.
        level = (torch.arange(count, dtype=x.dtype, device=x.device) + 0.5) / count
        survival = (-level).log1p()
        safe = torch.where(k.abs() < 1e-15, 1.0, k)[:, None]
        quantile = torch.where(
            k.abs()[:, None] < 1e-15, -survival, (-safe * survival).expm1() / safe
        )
        tail = (sigma[:, None] * quantile + cutoff[rows].exp()).log().clamp(max=0.0)
        fitted = (k.isfinite() & (sigma > 0))[:, None]
        x[rows[:, None], where[rows, -count:]] = torch.where(fitted, tail, largest[rows, -count:])
    return x - x.logsumexp(1, keepdim=True), shape


def _fit(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale of a generalised Pareto law, by the quasi-posterior mean of Zhang & Stephens.

    Args:
        excess: Positive and ascending, shape ``(columns, n)``.
    """
    n = excess.shape[1]
    points = 30 + int(n**0.5)
    grid = torch.arange(points, dtype=excess.dtype, device=excess.device) + 0.5
    quartile = excess[:, int(n / 4 + 0.5) - 1, None]
    b = 1 / excess[:, -1:] + (1 - (points / grid).sqrt()) / (3 * quartile)  # (columns, points)
    k = (-b[:, :, None] * excess[:, None, :]).log1p().mean(2)
    profile = n * ((-b / k).log() - k - 1)  # log-likelihood at its best k
    weight = profile.softmax(1)
    weight = torch.where(weight < 10 * torch.finfo(weight.dtype).eps, 0.0, weight)
    weight = weight / weight.sum(1, keepdim=True)
    b_mean = (b * weight).sum(1)
    k_mean = (-b_mean[:, None] * excess).log1p().mean(1)
    sigma = -k_mean / b_mean
    # A weak prior: ten values' worth of k = 0.5.
    return (n * k_mean + 5) / (n + 10), sigma


@dataclass(frozen=True)
class LOO:
    """Expected log predictive density of data left out; attributes named as in ArviZ 1.

    Attributes:
        elpd: Sum over the data, in nats.
        se: Its standard error, from the spread over the data.
        p: Effective number of parameters: what is lost by leaving out.
        elpd_i: Of each datum.
        pareto_k: Of each datum: above ``good_k`` its figure is not to be relied on.
        n_samples: Draws.
        n_data_points: Data.
        good_k: ``min(1 - 1 / log10(n_samples), 0.7)``.
        warning: Whether a ``pareto_k`` exceeds it.
        scale: Always ``"log"``.

    Example:
        >>> elpd, k = (xr.DataArray([a, b], dims="data") for a, b in ((-1.0, -2.0), (0.1, 0.9)))
        >>> result = LOO(-3.0, 0.7, 1.2, elpd, k, 1000, 2, good_k=0.67, warning=True)
        >>> result.pareto_k.values > result.good_k
        array([False,  True])
    """

    elpd: float
    se: float
    p: float
    elpd_i: xr.DataArray
    pareto_k: xr.DataArray
    n_samples: int
    n_data_points: int
    good_k: float
    warning: bool
    scale: str = "log"

    def to_arviz(self) -> Any:
        """As ``arviz.ELPDData``, for ``arviz.compare`` and plots of ArviZ before 1.0.

        Raises:
            NotImplementedError: With ArviZ 1, whose result has these attributes by these names.
        """
        if int(arviz.__version__.split(".")[0]) >= 1:
            raise NotImplementedError("Expected ArviZ before 1.0; there, read the attributes.")
        entries = {
            "elpd_loo": self.elpd,
            "se": self.se,
            "p_loo": self.p,
            "n_samples": self.n_samples,
            "n_data_points": self.n_data_points,
            "warning": self.warning,
            "loo_i": self.elpd_i.rename("loo_i"),
            "pareto_k": self.pareto_k,
            "scale": self.scale,
            "good_k": self.good_k,
        }
        return arviz.ELPDData(data=list(entries.values()), index=list(entries))


def loo(tree: xr.DataTree, *, var_name: str | None = None) -> LOO:
    r"""Leave each datum out, from draws of a guide.

    Draws of a guide are none of the posterior, so the ratios correct for both at once: with
    :math:`\ell` the log-likelihood of a datum and :math:`w` its log-weight,

    .. math:: r_{sn} = w_{sn} - \ell_{sn}, \qquad
        \mathrm{elpd}_n = \log \sum_s e^{\ell_{sn}} \, \mathrm{PSIS}(e^{r_{\cdot n}})_s

    Where all latent sites stand inside the plate of the data, nothing that is left tells of a
    datum, whose predictive density is its evidence: :math:`\mathrm{elpd}_n = \log \frac1S \sum_s
    e^{w_{sn}}` with the datum's own weight. (The general form has the same limit, by way of an
    estimate of one that is far noisier.) Of one site among several the general form is taken, with
    that weight. Where some sites are drawn outside, leaving a datum out moves those, and
    :math:`w_s` is the joint weight of all sites and data: right, but of few effective draws unless
    the guide is close; ``pareto_k`` tells. (``arviz.loo`` takes the draws for those of the
    posterior: no correction.)

    Args:
        tree: What ``diagnostics.to_datatree`` returns, with groups ``log_likelihood`` and
            ``sample_stats``.
        var_name: The observed site, if there are several; all sites of a datum are left out
            together by default.

    Raises:
        TypeError: If ``tree`` is no ``DataTree``.
        ValueError: If a group or variable is missing.

    Warns:
        UserWarning: If a ``pareto_k`` exceeds ``good_k``.

    References:
        Magnusson et al. (2019), ICML, sec. 2.2, for the correction; Vehtari, Gelman & Gabry
        (2017), Stat. Comput. 27.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.diagnostics.datatree import to_datatree
        >>> def model(y, num_data):
        ...     with pyro.plate("data", len(y)):
        ...         codes = pyro.sample("codes", dist.Normal(0.0, 1.0))
        ...         pyro.sample("obs", dist.Normal(codes, 1.0), obs=y)
        >>> def guide(y, num_data):
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("codes", dist.Normal(y / 2, 0.8))
        >>> y = torch.tensor([0.0, 1.0])
        >>> result = loo(to_datatree(model, guide, y, num_samples=4000))
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(y).sum()  # of one datum, the prior is left
        >>> abs(result.elpd - float(exact)) < 0.05
        True
    """
    if not isinstance(tree, xr.DataTree):
        raise TypeError(
            f"Expected what to_datatree returns, a DataTree, got {type(tree).__name__}."
        )
    missing = [group for group in ("log_likelihood", "sample_stats") if group not in tree.children]
    if missing:
        raise ValueError(f"Expected groups log_likelihood and sample_stats, got no {missing}.")
    stats, likelihoods = tree["sample_stats"].to_dataset(), tree["log_likelihood"].to_dataset()
    names = list(likelihoods.data_vars) if var_name is None else [var_name]
    if not names or any(name not in likelihoods for name in names):
        raise ValueError(
            f"Expected one of the observed sites {list(likelihoods.data_vars)}, got {var_name!r}."
        )
    weight = stats["log_weight"]
    plate = str(weight.dims[-1])
    likelihood = xr.zeros_like(weight)
    for name in names:
        values = likelihoods[name]
        if plate not in values.dims:
            raise ValueError(f"Expected site {name!r} inside the plate {plate!r} of the data.")
        events = [str(dim) for dim in values.dims if dim not in weight.dims]
        likelihood = likelihood + values.sum(dim=events)
    shared = "shared_log_weight" in stats
    if shared:
        scale = stats.attrs["num_data"] / weight.sizes[plate]
        weight = stats["shared_log_weight"] + scale * weight.sum(plate)
    ratio = (weight - likelihood).transpose("chain", "draw", plate)
    terms = torch.from_numpy(likelihood.transpose(*ratio.dims).values).flatten(0, 1)
    samples, size = terms.shape
    if shared or len(names) < len(likelihoods.data_vars):
        smoothed, shape = psis(torch.from_numpy(ratio.values).flatten(0, 1))
        pointwise = (terms + smoothed).logsumexp(0)
    else:
        own = torch.from_numpy(weight.transpose(*ratio.dims).values).flatten(0, 1)
        pointwise, shape = own.logsumexp(0) - math.log(samples), psis(own)[1]
    plain = (terms.logsumexp(0) - math.log(samples)).sum()
    good = min(1 - 1 / math.log10(samples), 0.7)
    high = int((shape > good).sum())
    if high:
        warnings.warn(
            f"The estimates of {high} of {size} data have a Pareto k above {good:.2f} and are not "
            "to be relied on: draw more, or use a guide closer to the posterior.",
            stacklevel=2,
        )
    coords = {plate: ratio[plate].values} if plate in ratio.coords else {}
    return LOO(
        elpd=float(pointwise.sum()),
        se=float((size * pointwise.var(correction=0)).sqrt()),
        p=float(plain - pointwise.sum()),
        elpd_i=xr.DataArray(pointwise.numpy(), coords, [plate], name="elpd_i"),
        pareto_k=xr.DataArray(shape.numpy(), coords, [plate], name="pareto_k"),
        n_samples=samples,
        n_data_points=size,
        good_k=good,
        warning=bool(high),
    )
