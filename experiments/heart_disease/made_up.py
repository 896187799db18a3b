"""Made-up hospitals of the same size and format: to look for settings on, and to test with, at no patient's risk.

Nothing in here comes from the four files but their format and their numbers of complete rows: a feature's scale is a
guess, and which features tell of the disease, and how much, is drawn anew for each seed.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.heart_disease.source import CENTRES, COLUMNS, MISSING, NAMES, Rows

SIZES = dict(zip(NAMES, (303, 261, 46, 130), strict=True))
"""Complete rows of each hospital, as published."""

_EFFECT = 0.5
# Standard deviation of a standardised feature's coefficient.
_SHIFT = 1.0
# And of what a hospital's patients are more, or less, ill than the others'.


def made_up_rows(seed: int, sizes: Mapping[str, int] = SIZES) -> dict[str, Rows]:
    """Rows (N, 14) of each hospital, complete."""
    generator = np.random.default_rng([seed, 14])
    effects = generator.normal(0.0, _EFFECT, len(COLUMNS) - 1)
    return {name: _hospital(size, effects, generator) for name, size in sizes.items()}


def write_files(directory: Path, centres: Mapping[str, Rows]) -> None:
    """The four files, with '?' for NaN."""
    directory.mkdir(parents=True, exist_ok=True)
    for centre in CENTRES:
        lines = (",".join(MISSING if np.isnan(cell) else f"{cell:g}" for cell in row) for row in centres[centre.name])
        (directory / centre.file).write_text("\n".join(lines) + "\n", encoding="ascii")


def _hospital(size: int, effects: Rows, generator: np.random.Generator) -> Rows:
    columns = {
        "age": np.round(np.clip(generator.normal(54, 9, size), 25, 85)),
        "sex": generator.random(size) < 0.7,
        "cp": generator.integers(1, 5, size),
        "trestbps": np.round(np.clip(generator.normal(132, 18, size), 80, 220)),
        "chol": np.round(np.clip(generator.normal(230, 60, size), 90, 600)),
        "fbs": generator.random(size) < 0.15,
        "restecg": generator.integers(0, 3, size),
        "thalach": np.round(np.clip(generator.normal(140, 25, size), 60, 210)),
        "exang": generator.random(size) < 0.4,
        "oldpeak": np.round(np.abs(generator.normal(0, 1.3, size)), 1),
        "slope": generator.integers(1, 4, size),
        "ca": generator.integers(0, 4, size),
        "thal": generator.choice([3, 6, 7], size),
    }
    features = np.stack([np.asarray(values, np.float64) for values in columns.values()], axis=1)
    standardised = (features - features.mean(axis=0)) / features.std(axis=0)
    logits = standardised @ effects + generator.normal(0, _SHIFT)
    ill = generator.random(size) < 1 / (1 + np.exp(-logits))
    return np.column_stack([features, ill * generator.integers(1, 5, size)])
