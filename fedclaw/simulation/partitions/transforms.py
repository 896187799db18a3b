"""What unlike instruments do to the same inputs: pure, seeded functions of a client's number and its inputs.

Three of the ways in which features differ between clients (Li, Diao, Chen, He 2022, "Federated learning on non-IID
data silos", section 3: noise-based feature imbalance, and transformed inputs as a synthetic one).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Transform(ABC):
    """A level for each client, and what it does to inputs."""

    kind: ClassVar[str]
    unit: ClassVar[str]

    levels: NDArray[np.float64]
    """(K,)"""

    @abstractmethod
    def apply(self, client: int, inputs: NDArray[Any]) -> NDArray[np.float64]:
        """The client's inputs (n, *D), changed; `inputs` are left as they are. The same arguments, the same result."""


@dataclass(frozen=True, eq=False)
class Noise(Transform):
    """Gaussian noise of a variance of its own at each client: the level, in units of `scale` squared."""

    kind: ClassVar[str] = "noise"
    unit: ClassVar[str] = "variance of the noise"

    scale: NDArray[np.float64]
    """Of shape D, or a single number for all: what counts as one."""
    bounds: tuple[float, float] | None
    """Values are kept within them; None: nothing is cut off."""
    seed: int

    def apply(self, client: int, inputs: NDArray[Any]) -> NDArray[np.float64]:
        """The inputs with noise, a draw for each number, which depends on the row's place among `inputs`."""
        generator = np.random.default_rng((self.seed, client))
        noise = generator.normal(0.0, np.sqrt(self.levels[client]), inputs.shape)
        noisy = inputs + noise * self.scale
        return noisy if self.bounds is None else np.clip(noisy, *self.bounds)


@dataclass(frozen=True, eq=False)
class Brightness(Transform):
    """Each client's images are brighter or darker by a factor, the level."""

    kind: ClassVar[str] = "brightness"
    unit: ClassVar[str] = "factor of brightness"

    bounds: tuple[float, float]
    """Of a pixel; the lower one is black."""

    def apply(self, client: int, inputs: NDArray[Any]) -> NDArray[np.float64]:
        """The images with each pixel's distance from black multiplied, and cut off at white."""
        black, white = self.bounds
        changed: NDArray[np.float64] = np.clip(black + (inputs - black) * self.levels[client], black, white)
        return changed


@dataclass(frozen=True, eq=False)
class Rotation(Transform):
    """Each client's images are turned by an angle, the level, counter-clockwise in degrees."""

    kind: ClassVar[str] = "rotation"
    unit: ClassVar[str] = "rotation, degrees"

    bounds: tuple[float, float]
    """Of a pixel; what comes in from outside is black."""

    def apply(self, client: int, inputs: NDArray[Any]) -> NDArray[np.float64]:
        """The images turned about their middle, drawn bilinearly; the last two dimensions are height and width."""
        height, width = inputs.shape[-2:]
        black = self.bounds[0]
        flat = inputs.reshape(-1, height * width) - black
        turned = np.zeros(flat.shape)
        for pixels, weights in _sources(height, width, float(self.levels[client])):
            turned += flat[:, pixels] * weights
        return turned.reshape(inputs.shape) + black


def _sources(height: int, width: int, degrees: float) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """For each of the four pixels that surround where a turned image's pixel comes from: which it is, and its weight.

    Both are of shape (height x width,); what lies outside weighs nothing.
    """
    angle = np.deg2rad(degrees)
    rows, columns = np.mgrid[:height, :width].reshape(2, -1) - np.array([[(height - 1) / 2], [(width - 1) / 2]])
    # Rows count downwards, so this is a turn clockwise, back to where the pixel was.
    row = np.cos(angle) * rows + np.sin(angle) * columns + (height - 1) / 2
    column = -np.sin(angle) * rows + np.cos(angle) * columns + (width - 1) / 2
    for down in (0, 1):
        for right in (0, 1):
            near_row, near_column = np.floor(row).astype(int) + down, np.floor(column).astype(int) + right
            weights = (1 - np.abs(row - near_row)) * (1 - np.abs(column - near_column))
            inside = (near_row >= 0) & (near_row < height) & (near_column >= 0) & (near_column < width)
            yield np.where(inside, near_row * width + near_column, 0), np.where(inside, weights, 0.0)
