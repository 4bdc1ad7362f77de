"""Training against clean data: what model and guide make of a corrupted datum, and its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_sparse.likelihoods import check_mask
from pyro_sparse.ops import check_tensor

Predict = Callable[..., Tensor]
"""Called as ``predict(y, mask)`` with data and None or a mask; gives data of the same shape.

``Reconstruct(model, guide)`` is one, and so is the ``reconstruct`` of a guide that has its own,
such as ``guides.ShiftAveraged``."""


class Reconstruct(nn.Module):
    r"""What a model expects of data, given the codes that a guide finds in them.

    .. math:: \hat y = \mathbb{E}[y \mid \hat z], \qquad \hat z = \mathbb{E}_{q(z \mid y)}[z]

    The guide runs on the data with every latent site at the mean of its law, which for a point
    guide is the point; the model is replayed with these values, and the mean of its law at
    ``"obs"`` is read. Nothing is drawn, and the result is differentiable in both programs. Any Pyro
    model with a site ``"obs"`` will do, and any guide of its latent sites whose laws have means.

    Args:
        model: Generative program, called as ``model(y, num_data)``, with ``mask=`` where one is
            given.
        guide: Its guide, called alike.

    Raises:
        TypeError: If one of them cannot be called.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro import plate, sample
        >>> def model(y, num_data):
        ...     with plate("data", num_data):
        ...         codes = sample("codes", dist.Normal(0.0, 1.0))
        ...         sample("obs", dist.Poisson(codes.exp()), obs=y)
        >>> def guide(y, num_data):
        ...     with plate("data", num_data):
        ...         sample("codes", dist.Normal(y.log(), 0.1))
        >>> Reconstruct(model, guide)(torch.tensor([1.0, 4.0]))
        tensor([1., 4.])
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
        super().__init__()
        for name, program in (("model", model), ("guide", guide)):
            if not callable(program):
                raise TypeError(f"Expected {name} to be a program, got {type(program).__name__}.")
        self.model = model
        self.guide = guide

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Expected data, shape of ``y``, also where they were not observed.

        Args:
            y: Shape ``(n, *signal_shape)``.
            mask: True where a sample was observed, broadcastable to ``y``.

        Raises:
            NotImplementedError: If a law has no mean.
            ValueError: If the model has no site ``"obs"``, or a latent site that the guide lacks.
        """
        args, kwargs = (y, len(y)), {} if mask is None else {"mask": mask}
        with _AtMeans():
            codes = poutine.trace(self.guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(self.model, trace=codes)
        nodes: dict[str, Any] = poutine.trace(replayed).get_trace(*args, **kwargs).nodes
        missing = [name for name, site in nodes.items() if _latent(site) and name not in codes]
        if missing:
            raise ValueError(
                f"Expected a guide of all latent sites of the model, but it lacks {missing}."
            )
        if "obs" not in nodes or nodes["obs"]["type"] != "sample":
            raise ValueError(f'Expected a model with the site "obs", got {sorted(nodes)}.')
        return _mean("obs", nodes["obs"]["fn"])


class Supervised:
    r"""Error of what model and guide make of corrupted data, against the clean ones.

    .. math:: \text{num\_data} \cdot \mathrm{loss}\big(\hat y(\text{corrupt}(y)),\, y\big)

    With :math:`\hat y` as in ``Reconstruct``. The data that this is trained on are the clean ones,
    and every step corrupts them anew. Like an ELBO it is called as ``Supervised(...)(model,
    guide)``, and the module that this gives as ``objective(y, num_data, mask=)``; ``infer.fit``
    divides by ``num_data``, so its history shows the loss itself. This is no bound of an evidence:
    priors and scales of likelihoods move only as far as the codes depend on them.

    Samples that were not observed count as predicted without error, which weighs all observed ones
    alike, whatever minibatch they are in.

    Args:
        loss: Called as ``loss(prediction, target)``, gives a scalar that is a mean over data;
            default ``nn.MSELoss()``. ``PerceptualLoss()`` is another.
        corrupt: Called with the clean minibatch; gives what the guide sees, of the same shape, or a
            pair of that and a mask that is True where it was observed (for in-painting; the error
            counts the others too). None: the clean data themselves. For noise, as published,
            ``lambda clean: clean + scale * torch.randn_like(clean)``; for counts, where data are
            rates, ``torch.poisson``.
        predict: Called as ``predict(y, mask)``, such as the ``reconstruct`` of
            ``guides.ShiftAveraged``, whose parameters have to be those of the model or the guide;
            default ``Reconstruct(model, guide)``.

    Raises:
        TypeError: If an argument cannot be called.

    References:
        Tolooshams, Song, Temereanca & Ba (2020), ICML, PMLR 119:9493-9503 (DCEA): fresh noise at
        every step, and the mean squared error of the rates.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro import plate, sample
        >>> def model(y, num_data):
        ...     with plate("data", num_data):
        ...         codes = sample("codes", dist.Laplace(0.0, 1.0))
        ...         sample("obs", dist.Normal(codes, 1.0), obs=y)
        >>> def guide(y, num_data):
        ...     with plate("data", num_data):
        ...         sample("codes", dist.Delta(y / 2))
        >>> Supervised()(model, guide)(torch.tensor([2.0, 4.0]), 100)  # 100 * (1 + 4) / 2
        tensor(250.)
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        corrupt: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]] | None = None,
        predict: Predict | None = None,
    ) -> None:
        for name, value in (("loss", loss), ("corrupt", corrupt), ("predict", predict)):
            if (value is not None and not callable(value)) or isinstance(value, type):
                raise TypeError(
                    f"Expected {name} to be called with tensors, such as loss=nn.MSELoss(), got "
                    f"{value!r}."
                )
        self.loss = nn.MSELoss() if loss is None else loss
        self.corrupt = corrupt
        self.predict = predict

    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> nn.Module:
        """The objective for a model and a guide, a module that holds both."""
        return _SupervisedObjective(model, guide, self)

    def seen(self, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the guide gets to see of clean data: a fresh draw, and where it was observed."""
        if self.corrupt is None:
            return y, mask
        with torch.no_grad():
            drawn = self.corrupt(y)
        given, observed = drawn if isinstance(drawn, tuple) else (drawn, None)
        check_tensor("the corrupted data", given, y)
        if given.shape != y.shape:
            raise ValueError(
                f"Expected corrupt to keep the shape of the data, {tuple(y.shape)}, got "
                f"{tuple(given.shape)}."
            )
        if observed is None:
            return given, mask
        observed = check_mask(y, observed)
        return given, observed if mask is None else observed & mask

    def error(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """The loss, with samples that were not observed as if predicted without error."""
        if prediction.shape != target.shape:
            raise ValueError(
                f"Expected a prediction of the data's shape {tuple(target.shape)}, got "
                f"{tuple(prediction.shape)}."
            )
        if mask is not None:
            prediction = torch.where(mask, prediction, target)
        error = self.loss(prediction, target)
        if not isinstance(error, Tensor) or error.dim():
            shape = tuple(error.shape) if isinstance(error, Tensor) else type(error).__name__
            raise ValueError(
                f"Expected a loss that gives a scalar, got {shape}. Try reduction='mean'."
            )
        return error


class _SupervisedObjective(nn.Module):
    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], supervised: Supervised
    ) -> None:
        super().__init__()
        # No part of the loss is a part of this: what it holds is not trained.
        self.plain = Reconstruct(model, guide)
        self.supervised = (supervised,)

    def forward(self, y: Tensor, num_data: int | None = None, mask: Tensor | None = None) -> Tensor:
        (supervised,) = self.supervised
        check_tensor("y", y)
        if mask is not None:
            mask = check_mask(y, mask)
            y = torch.where(mask, y, torch.zeros_like(y))  # what was not observed may be nan
        predict = self.plain if supervised.predict is None else supervised.predict
        prediction = predict(*supervised.seen(y, mask))
        return (num_data or len(y)) * supervised.error(prediction, y, mask)


class _AtMeans(Messenger):
    """Every latent site at the mean of its law instead of a draw."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not msg["done"] and not site_is_subsample(msg):
            msg["value"] = _mean(msg["name"], msg["fn"])
            msg["done"] = True


def _mean(name: str, law: Any) -> Tensor:
    try:
        mean: Tensor = law.mean
    except NotImplementedError:
        raise NotImplementedError(
            f"Expected a law with a mean at site {name!r}, got {law}. Give Supervised a predict= "
            "of your own."
        ) from None
    return mean


def _latent(site: Any) -> bool:
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("is_auxiliary")
    )
