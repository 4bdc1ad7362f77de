"""How much of an image atom a Gabor function explains."""

from __future__ import annotations

import numpy as np
from scipy.optimize import least_squares

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def r_squared(atoms: Array, starts: int = 3) -> Array:
    r"""Part of an atom's variance that the best Gabor function explains.

    .. math:: e^{-u^2 / 2 s_u^2 - v^2 / 2 s_v^2} \,(a \cos 2\pi f u + b \sin 2\pi f u)

    with :math:`(u, v)` the pixel's place about a centre, turned by an angle. The linear part
    :math:`a, b` is eliminated (variable projection); the rest is fitted from the strongest
    frequencies of the atom. At 7 x 7 pixels, white noise comes to about 0.3.

    Args:
        atoms: Shape ``(atoms, height, width)``.
        starts: How many of the strongest frequencies to start from.

    Returns:
        Shape ``(atoms,)``, at most 1; 0 for a constant atom.

    References:
        Jones & Palmer (1987), J. Neurophysiol. 58(6); variable projection: Golub & Pereyra (1973),
        SIAM J. Numer. Anal. 10(2).
    """
    return np.array([_best(np.asarray(atom, dtype=float), starts) for atom in atoms])


def _best(atom: Array, starts: int) -> float:
    total = ((atom - atom.mean()) ** 2).sum()
    if total < 1e-12 * max((atom**2).sum(), 1e-300):
        return 0.0
    return float(max(1 - _error(atom, start) / total for start in _starts(atom, starts)))


def _starts(atom: Array, count: int) -> list[list[float]]:
    """Centre of the energy, a width of a third of the atom, and the strongest frequencies."""
    height, width = atom.shape
    energy = (atom - atom.mean()) ** 2
    rows, columns = np.mgrid[:height, :width]
    y, x = (energy * rows).sum() / energy.sum(), (energy * columns).sum() / energy.sum()
    padded = 4 * max(atom.shape)
    power = np.abs(np.fft.fft2(atom - atom.mean(), (padded, padded))) ** 2
    frequency = np.fft.fftfreq(padded)
    power[:, frequency < 0] = 0  # each frequency once
    found: list[list[float]] = []
    reach = padded // min(atom.shape)
    for _ in range(count):
        i, j = np.unravel_index(power.argmax(), power.shape)
        angle = float(np.arctan2(frequency[i], frequency[j]))
        size = float(np.hypot(frequency[i], frequency[j]))
        found.append([y, x, np.log(height / 3), np.log(width / 3), angle, size])
        near = np.arange(-reach // 2, reach // 2 + 1)
        power[np.ix_((i + near) % padded, (j + near) % padded)] = 0
    return found


def _error(atom: Array, start: list[float]) -> float:
    size = max(atom.shape)
    lower = [-1.0, -1.0, np.log(0.5), np.log(0.5), -2 * np.pi, 0.0]
    upper = [float(atom.shape[0]), float(atom.shape[1]), np.log(2 * size), np.log(2 * size)]
    upper += [2 * np.pi, 0.5]
    inside = np.clip(start, np.array(lower) + 1e-6, np.array(upper) - 1e-6)
    found = least_squares(lambda p: _residual(p, atom), inside, bounds=(lower, upper), max_nfev=100)
    return float(2 * found.cost)


def _residual(parameters: Array, atom: Array) -> Array:
    y, x, along, across, angle, frequency = parameters
    rows, columns = np.mgrid[: atom.shape[0], : atom.shape[1]]
    u = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
    v = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
    window = np.exp(-(u**2) * np.exp(-2 * along) / 2 - v**2 * np.exp(-2 * across) / 2)
    phase = 2 * np.pi * frequency * u
    basis = np.stack([window * np.cos(phase), window * np.sin(phase)])
    design, target = basis.reshape(2, -1).T, atom.ravel()
    weights = np.linalg.lstsq(design, target, rcond=None)[0]
    residual: Array = target - design @ weights
    return residual
