"""Amortised posteriors whose codes depend on one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_sparse.distributions.structured import StructuredSpikeAndSlab
from pyro_sparse.guides.emission import check_parts, emit
from pyro_sparse.guides.refinement import refine
from pyro_sparse.infer.bundle import register_savable
from pyro_sparse.infer.elbo import SparseELBO
from pyro_sparse.infer.estimators import LeaveOneOut
from pyro_sparse.infer.phases import Optimizer
from pyro_sparse.infer.store import claim_names
from pyro_sparse.ops import check_tensor

NAMES = ("loc", "log_scale", "logits")


class Couplings(nn.Module):
    """Learned matrix of how much each code takes off the later ones, zero elsewhere.

    Args:
        init: Starting values, shape ``(atoms, atoms)``.
    """

    def __init__(self, init: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(init.detach().tril(-1).clone())

    def forward(self) -> Tensor:
        """Shape ``(atoms, atoms)``."""
        return self.weight.tril(-1)


class StructuredThresholded(PyroModule):
    r"""Posterior with dependent gates, for codes of correlated atoms.

    .. math:: q(z_n \mid y_n) = \prod_k q(z_{nk} \mid z_{n,<k}, y_n)

    the law ``distributions.StructuredSpikeAndSlab``: an encoder emits location, scale and log-odds
    of every code, as for ``Thresholded``, and a matrix of couplings, learned and shared by all
    data, lets the value of each code take back what it explains from the later ones. Drawing takes
    as many steps as there are atoms; use it where atoms are correlated and their number moderate,
    and ``Thresholded`` elsewhere.

    What the encoder emits are the parameters of that law: ``"loc"`` holds when the codes before are
    zero, and ``"logits"`` where nothing is left to explain. An encoder may emit a fourth tensor,
    ``"codes"``, to say that its numbers are those of independent codes, each given all others at
    these values, as ``Thresholded`` takes them; the guide then adds back what the codes before
    had taken off, and takes off the evidence that the law counts itself:

    .. math:: \mu_k = \mathtt{loc}_k + \sum_{j<k} C_{kj}\, \mathtt{codes}_j, \qquad
        \ell_k = \mathtt{logits}_k - \mathtt{loc}_k^2 / 2 s_k^2

    Its ELBO has no closed form: train it with ``SparseELBO(LeaveOneOut(), num_samples=4)``, which
    did better than the pathwise draw that ``SparseELBO()`` takes.

    Site: ``"codes"``, event shape ``(atoms,)``, in the plate ``"data"`` of dim -1.

    Args:
        encoder: A module that maps ``(y, mask)`` to a dict with ``"loc"``, ``"log_scale"`` and
            ``"logits"``, and ``"codes"`` or not, each of shape ``(n, atoms)``: ``Heads`` of a
            network, or one's own.
        couplings: Starting values, shape ``(atoms, atoms)``, read below the diagonal: the Gram
            matrix ``atoms @ atoms.T`` of unit-norm atoms, which is near the optimum for Gaussian
            noise that is small next to the slab; or zeros.
        rest: A guide of the model's other latent sites, called first with the same arguments.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``couplings`` is not square, or ``encoder`` states ``names`` and lacks one.

    Example:
        >>> from pyro_sparse.guides import Heads
        >>> atoms = torch.nn.functional.normalize(torch.randn(8, 5), dim=1)
        >>> encoder = Heads(nn.Sequential(nn.Linear(5, 16), nn.ReLU()), 16, code_shape=8)
        >>> guide = StructuredThresholded(encoder, couplings=atoms @ atoms.T)
        >>> guide.posterior(torch.randn(3, 5)).marginals(100).prob_active.shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        encoder: nn.Module,
        couplings: Tensor,
        *,
        rest: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        check_parts(encoder, rest, NAMES)
        check_tensor("couplings", couplings)
        if couplings.dim() != 2 or couplings.shape[0] != couplings.shape[1]:
            raise ValueError(
                f"Expected couplings of shape (atoms, atoms), got {tuple(couplings.shape)}. "
                "Try atoms @ atoms.T, or torch.zeros(num_atoms, num_atoms)."
            )
        self.encoder = encoder
        self.couplings = Couplings(couplings)
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
            Codes, shape ``(n, atoms)``.
        """
        claim_names(self)
        if self.rest is not None:
            self.rest(y, num_data, **({} if mask is None else {"mask": mask}))
        law = self._law(self.parameters_of(y, mask, num_data=num_data))
        index = torch.arange(len(y), device=y.device)
        with pyro.plate("data", num_data or len(y), subsample=index):
            return pyro.sample("codes", law)

    def posterior(self, y: Tensor, mask: Tensor | None = None) -> StructuredSpikeAndSlab:
        """Law of the codes of a batch, batch shape ``(n,)``, event shape ``(atoms,)``.

        Which codes are active, and with what probability, is ``.marginals(num_samples)``, by Monte
        Carlo; ``.given(codes)`` is the law of each code given those before it.
        """
        return self._law(self.parameters_of(y, mask))

    def parameters_of(
        self, y: Tensor, mask: Tensor | None = None, *, num_data: int | None = None
    ) -> dict[str, Tensor]:
        """What the encoder emits for a batch, by name, each ``(n, atoms)``.

        Raises:
            TypeError: If ``y`` is not a floating tensor of the parameters' dtype.
            RuntimeError: If it is on another device.
            ValueError: If a parameter is missing, or has another shape than ``(n, atoms)``.
        """
        like = self.couplings.weight
        emitted = emit(
            self.encoder, y, mask, NAMES, like=like, num_data=num_data, optional=("codes",)
        )
        expected = (len(y), len(like))
        if tuple(emitted["loc"].shape) != expected:
            raise ValueError(
                f"Expected parameters of shape (n, atoms) = {expected}, got "
                f"{tuple(emitted['loc'].shape)}. Codes with positions need guides.Thresholded."
            )
        return emitted

    def refine(
        self,
        model: Callable[..., Any],
        y: Tensor,
        *,
        mask: Tensor | None = None,
        num_steps: int = 200,
        loss: ELBO | None = None,
        optimizer: Optimizer | None = None,
    ) -> StructuredThresholded:
        """Posterior of each datum for itself, starting from what the encoder emits.

        As ``Thresholded.refine``; the couplings, which all data share, are held. What moves are the
        parameters of the law itself: of an encoder with ``"codes"`` these are absorbed.

        Args:
            model: Generative program, held still.
            y: Data, shape ``(n, *signal_shape)``.
            mask: True where a sample was observed.
            num_steps: Steps of the optimiser, ``>= 1``.
            loss: Objective; default ``SparseELBO(LeaveOneOut(), num_samples=4)``.
            optimizer: Makes an optimiser of the parameters; default Adam with a learning rate of
                0.03, which in the last quarter falls to zero.

        Returns:
            A guide of these data alone, in this order, whose encoder is a ``PerDatum``; with the
            same sites and copies of ``couplings`` and ``rest``, whose parameters did not move.

        Raises:
            TypeError: If ``model`` is no program, or ``loss`` has no gradient of its own (is none
                of Pyro's ELBOs).

        References:
            Kim et al. (2018), ICML, PMLR 80:2678-2687.
        """

        def start() -> dict[str, Tensor]:
            emitted = self.parameters_of(y, mask)
            law = self._law(emitted)
            return {"loc": law.loc, "log_scale": emitted["log_scale"], "logits": law.logits}

        return refine(
            self,
            start,
            model,
            y,
            mask=mask,
            num_steps=num_steps,
            loss=SparseELBO(LeaveOneOut(), num_samples=4) if loss is None else loss,
            optimizer=optimizer,
            learning_rate=0.03,  # 0.1 overshoots: couplings carry a step to the later codes
        )

    def _law(self, emitted: dict[str, Tensor]) -> StructuredSpikeAndSlab:
        couplings = self.couplings()
        loc, scale, logits = emitted["loc"], emitted["log_scale"].exp(), emitted["logits"]
        if "codes" in emitted:
            logits = logits - (loc / scale).square() / 2
            loc = loc + emitted["codes"] @ couplings.mT
        return StructuredSpikeAndSlab(logits, loc, scale, couplings)


register_savable(
    StructuredThresholded,
    name="pyro_sparse.guides.StructuredThresholded",
    arguments=lambda guide: {
        "encoder": guide.encoder,
        "couplings": guide.couplings.weight.detach(),
        "rest": guide.rest,
    },
)
