"""Images that are made, not downloaded: ten things to tell apart, seen by as many writers as wanted.

For problems of any size, above all thousands of clients. A label is a few smooth shapes; an image is one of them,
shifted a little, with its writer's contrast and liking for some of the shapes, under noise. A small convolutional
network learns it nearly perfectly, a linear model clearly less well. Same settings, same images, to the last bit.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.frozen import Frozen

_SHAPES = 3
"""Smooth shapes of a label."""
_CELLS = 4
"""A shape is drawn on a grid of so many cells a side."""
_BLOCK = 1 << 22
"""Pixels made at a time, so that memory is that of the images, a byte each."""


class SyntheticImages(Frozen):
    """conf/dataset/synthetic_images.yaml: how many images, of what size, and how hard to tell apart."""

    examples: int = Field(default=20_000, ge=100, le=10_000_000)
    side: int = Field(default=8, ge=8, le=64)
    """Pixels of a side: 8 like scikit-learn's digits, 28 like MNIST."""
    labels: int = Field(default=10, ge=2, le=100)
    writers: int = Field(default=100, ge=1)
    """Who made the images: the sites of partition=natural."""
    noise: float = Field(default=0.2, ge=0, le=2)
    """Standard deviation of a pixel's noise; pixels are in [0, 1]."""
    seed: int = Field(default=0, ge=0)
    """Of the images. The deal has the data set's own seed: the same problem, dealt anew."""


@dataclass(frozen=True, eq=False)
class MadeImages:
    """images (N, side, side) uint8, targets (N,) and writers (N,)."""

    images: NDArray[np.uint8]
    targets: NDArray[np.int64]
    writers: NDArray[np.int64]


def make_images(settings: SyntheticImages) -> MadeImages:
    """The images of these settings. Memory: little more than their pixels, a byte each."""
    generator = np.random.default_rng(settings.seed)
    shapes = _shapes(settings, generator)
    targets = generator.permutation(np.arange(settings.examples) % settings.labels)
    writers = generator.integers(settings.writers, size=settings.examples)
    liking = np.cumsum(generator.dirichlet(np.ones(_SHAPES), settings.writers), axis=1)
    contrast = generator.uniform(0.6, 1.0, settings.writers)
    chosen = (generator.random(settings.examples)[:, None] > liking[writers, :-1]).sum(axis=1)
    reach = settings.side // 8
    shifts = generator.integers(-reach, reach + 1, (settings.examples, 2))
    images = np.empty((settings.examples, settings.side, settings.side), np.uint8)
    step = max(1, _BLOCK // settings.side**2)
    for start in range(0, settings.examples, step):
        part = slice(start, start + step)
        clean = _shifted(shapes[targets[part], chosen[part]], shifts[part])
        clean *= contrast[writers[part], None, None].astype(np.float32)
        noise = generator.standard_normal(clean.shape, np.float32)
        clean += np.float32(settings.noise) * noise
        images[part] = np.round(np.clip(clean, 0, 1) * 255)
    return MadeImages(images, targets, writers)


def _shapes(settings: SyntheticImages, generator: np.random.Generator) -> NDArray[np.float32]:
    """(labels, shapes, side, side) in [0, 1]: coarse random grids, drawn out bilinearly."""
    coarse = generator.random((settings.labels, _SHAPES, _CELLS, _CELLS))
    place = np.linspace(0, _CELLS - 1, settings.side)
    weights = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(_CELLS)))
    smooth = weights @ coarse @ weights.T
    low, high = smooth.min(axis=(2, 3), keepdims=True), smooth.max(axis=(2, 3), keepdims=True)
    shapes: NDArray[np.float32] = ((smooth - low) / (high - low)).astype(np.float32)
    return shapes


def _shifted(images: NDArray[np.float32], shifts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Each image moved by its (down, right), what leaves on one side coming in on the other."""
    side = images.shape[-1]
    down = (np.arange(side) - shifts[:, :1]) % side
    right = (np.arange(side) - shifts[:, 1:]) % side
    moved: NDArray[np.float32] = images[np.arange(len(images))[:, None, None], down[:, :, None], right[:, None, :]]
    return moved
