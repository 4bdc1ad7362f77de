"""Amortised posteriors with exact zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_sparse.guides.emission import check_parts, emit
from pyro_sparse.guides.posteriors import SpikeAndSlabPosterior
from pyro_sparse.guides.refinement import refine
from pyro_sparse.infer.bundle import register_savable
from pyro_sparse.infer.elbo import SparseELBO
from pyro_sparse.infer.phases import Optimizer
from pyro_sparse.infer.store import claim_names


class Thresholded(PyroModule):
    r"""Posterior of the codes with an atom at zero, its parameters emitted by an encoder.

    .. math:: q(z_n \mid y_n) = \prod_k \big[(1 - g_{nk})\, \delta_0(z_{nk}) + g_{nk}\,
        s(z_{nk}; \mu_{nk}, b_{nk})\big]

    Which codes are active, and with what probability, is read off ``posterior(y).prob_active``.
    Train it with ``infer.SparseELBO``.

    Site: ``"codes"``, event shape ``(atoms, *positions)``, in the plate ``"data"`` of dim -1; a
    posterior with a sampled threshold adds ``"threshold"``.

    Args:
        encoder: A module that maps ``(y, mask)`` to a dict of unconstrained parameters, each of
            shape ``(n, atoms, *positions)``: ``Heads`` of a network, an ``UnrolledEncoder``, or
            one's own.
        family: Makes a law of them; default ``SpikeAndSlabPosterior()`` with a normal slab. For
            dense baselines ``DensePosterior``, for the published laws ``ThresholdPosterior`` and
            ``GammaThresholdPosterior``; for the Concrete one train a ``SpikeAndSlabPosterior`` with
            ``SparseELBO(Concrete())``.
        rest: A guide of the model's other latent sites (``"rate"``, ``"dictionary"``), such as an
            ``AutoNormal`` of them, called first with the same arguments.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``encoder`` states ``names`` and lacks one that ``family`` asks for.

    References:
        Fallah & Rozell (2022), ICML, PMLR 162:6034-6058; here with exact KLs and free inclusion.

    Example:
        >>> from pyro_sparse.guides import Heads
        >>> encoder = Heads(nn.Sequential(nn.Linear(5, 16), nn.ReLU()), 16, code_shape=8)
        >>> guide = Thresholded(encoder)
        >>> guide.posterior(torch.randn(3, 5)).prob_active.shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        encoder: nn.Module,
        family: Callable[[dict[str, Tensor]], Any] | None = None,
        *,
        rest: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        family = SpikeAndSlabPosterior() if family is None else family
        if not callable(family) or not hasattr(family, "names") or isinstance(family, type):
            raise TypeError(
                "Expected family to be a posterior with names and a call, such as "
                f"SpikeAndSlabPosterior(), got {family!r}."
            )
        check_parts(encoder, rest, family.names)
        self.encoder = encoder
        self.family = family
        self.rest = rest

    def forward(
        self,
        y: Tensor,
        num_data: int | None = None,
        mask: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """Run the guide.

        Args:
            y: Minibatch of data, shape ``(n, *signal_shape)``.
            num_data: Size of the whole data set; by default ``n``.
            mask: True where a sample was observed, broadcastable to ``y``.
            label: Classes that the model is given; codes do not depend on them.

        Returns:
            Codes, shape ``(n, atoms, *positions)``.
        """
        claim_names(self)
        if self.rest is not None:
            self.rest(y, num_data, **({} if mask is None else {"mask": mask}))
        parameters = self.parameters_of(y, mask, num_data=num_data)
        return _sample(self.family, parameters, len(y), num_data)

    def posterior(self, y: Tensor, mask: Tensor | None = None) -> Any:
        """Law of the codes of a batch, elementwise, batch shape ``(n, atoms, *positions)``.

        Its ``prob_active``, ``mean``, ``variance`` and ``slab`` (the law given that a code is
        active) are closed forms. Where the threshold is sampled, that given one draw of it.
        """
        with pyro.poutine.block():
            return self.family(self.parameters_of(y, mask))

    def parameters_of(
        self, y: Tensor, mask: Tensor | None = None, *, num_data: int | None = None
    ) -> dict[str, Tensor]:
        """What the encoder emits for a batch, by name, each ``(n, atoms, *positions)``.

        Raises:
            TypeError: If ``y`` is not a floating tensor of the parameters' dtype.
            RuntimeError: If it is on another device.
            ValueError: If a parameter of the family is missing, or has another shape.
        """
        like = next((p for p in self.encoder.parameters() if p.is_floating_point()), None)
        return emit(self.encoder, y, mask, self.family.names, like=like, num_data=num_data)

    def refine(
        self,
        model: Callable[..., Any],
        y: Tensor,
        *,
        mask: Tensor | None = None,
        num_steps: int = 200,
        loss: ELBO | None = None,
        optimizer: Optimizer | None = None,
    ) -> Thresholded:
        """Posterior of each datum for itself, starting from what the encoder emits.

        The semi-amortised posterior: by how much it raises the bound is the amortisation gap.
        Parameters, buffers and Pyro's parameter store stay as they are; torch's random state goes
        on where the objective draws. The encoder runs once and the model at every step in the mode
        they are in: call ``eval()`` where they hold batch normalisation or dropout.

        Args:
            model: Generative program, held still.
            y: Data, shape ``(n, *signal_shape)``.
            mask: True where a sample was observed.
            num_steps: Steps of the optimiser, ``>= 1``.
            loss: Objective; default ``SparseELBO()``.
            optimizer: Makes an optimiser of the parameters; default Adam with a learning rate of
                0.1, which in the last quarter falls to zero.

        Returns:
            A guide of these data alone, in this order, whose encoder is a ``PerDatum``; with the
            same sites and copies of ``family`` and ``rest``, whose parameters did not move.

        Raises:
            TypeError: If ``model`` is no program, or ``loss`` has no gradient of its own (is none
                of Pyro's ELBOs).

        References:
            Kim et al. (2018), ICML, PMLR 80:2678-2687.
        """

        def start() -> dict[str, Tensor]:
            emitted = self.parameters_of(y, mask)
            return {name: emitted[name] for name in self.family.names}

        return refine(
            self,
            start,
            model,
            y,
            mask=mask,
            num_steps=num_steps,
            loss=SparseELBO() if loss is None else loss,
            optimizer=optimizer,
            learning_rate=0.1,
        )


def _sample(
    family: Callable[[dict[str, Tensor]], Any],
    parameters: dict[str, Tensor],
    size: int,
    num_data: int | None,
) -> Tensor:
    like = next(iter(parameters.values()))
    index = torch.arange(size, device=like.device)
    with pyro.plate("data", num_data or size, subsample=index):
        law = family(parameters)
        return pyro.sample("codes", law.to_event(like.dim() - 1))


register_savable(Thresholded, name="pyro_sparse.guides.Thresholded")
