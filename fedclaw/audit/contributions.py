"""How much of an update each example explains, when the adversary knows the examples' gradients.

Legend: E examples, d coordinates of the gradient.
"""

import numpy as np
from numpy.typing import NDArray

_GRID = np.logspace(-6, 6, 25)
# Noise over signal, in units of the mean square of a gradient.


def contributions(gradients: NDArray[np.float64], moved: NDArray[np.float64]) -> NDArray[np.float64]:
    """The most plausible multiple of each gradient in `moved`, (E,), but for a constant; gradients (E, d), moved (d,).

    Model: moved = sum of (c + b_i) x gradient_i + noise, with b_i and the noise normal and their ratio unknown. The
    common c is taken out by least squares, the ratio chosen by marginal likelihood, the b_i are then those of a ridge
    regression. Only gradients and update go in, so the choice cannot favour what the coins were.
    """
    common = gradients.sum(axis=0)
    square = float(common @ common)
    rest = moved - (float(moved @ common) / square) * common if square else moved
    scale = float((gradients**2).sum()) / len(gradients)
    if not (scale and np.any(rest)):
        return np.zeros(len(gradients))
    values, vectors = np.linalg.eigh(gradients @ gradients.T / scale)
    values = np.maximum(values, 0.0)
    along = vectors.T @ (gradients @ rest) / np.sqrt(scale)
    best = max(_GRID, key=lambda ratio: _likelihood(ratio, values, along, rest))
    return np.asarray(vectors @ (along / (values + best)) / np.sqrt(scale))


def _likelihood(
    ratio: float, values: NDArray[np.float64], along: NDArray[np.float64], rest: NDArray[np.float64]
) -> float:
    """Logarithm, but for a constant, with the best scale: by the matrix inversion lemma in the examples' space."""
    left = max(float(rest @ rest - (along**2 / (values + ratio)).sum()), np.finfo(float).tiny)
    return -float(np.log1p(values / ratio).sum()) - len(rest) * float(np.log(left))
