"""The published preparation of the four hospitals' rows: FLamby's Fed-Heart-Disease.

du Terrail and others 2022, "FLamby: Datasets and Benchmarks for Cross-Silo Federated Learning in Realistic Healthcare
Settings", NeurIPS Datasets and Benchmarks (https://arxiv.org/abs/2210.04620).

Drop slope, ca and thal, which most rows of three hospitals lack, and then every row that lacks anything; one-hot encode
cp and restecg, whose levels are those of all hospitals together, without the first level; the label is num != 0. A
hospital's test rows are 34% of its rows, stratified by label if it has more than two of each.

Legend: N rows, D features (13 with the published files).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.heart_disease.source import COLUMNS, Rows
from fedclaw.errors import DataError

DROPPED = ("slope", "ca", "thal")
CATEGORICAL = ("cp", "restecg")
TARGET = "num"
TRAIN_SHARE = 0.66
SPLIT_SEED = 43
FEWEST = 10
"""Complete rows that a hospital needs to be split."""


@dataclass(frozen=True)
class Part:
    """Features (N, D), not standardised, and labels (N,) in {0, 1}."""

    features: Rows
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, which: NDArray[np.int64]) -> "Part":
        """Those rows."""
        return Part(self.features[which], self.labels[which])


@dataclass(frozen=True)
class Split:
    """One hospital's rows."""

    train: Part
    test: Part


@dataclass(frozen=True)
class Hospitals:
    """All of them, by name, and the names of the D features."""

    features: tuple[str, ...]
    splits: Mapping[str, Split]

    def pooled(self) -> Split:
        """Everybody's rows, one hospital after the other."""
        return Split(
            _stacked([split.train for split in self.splits.values()]),
            _stacked([split.test for split in self.splits.values()]),
        )


def prepare(centres: Mapping[str, Rows]) -> Hospitals:
    """Prepare and split the rows (N, 14) of each hospital. Raises DataError for one with too few complete rows."""
    kept = [name for name in COLUMNS if name not in DROPPED]
    chosen = {name: rows[:, [COLUMNS.index(column) for column in kept]] for name, rows in centres.items()}
    complete = {name: rows[~np.isnan(rows).any(axis=1)] for name, rows in chosen.items()}
    for name, rows in complete.items():
        if len(rows) < FEWEST:
            raise DataError(f"{name} has {len(rows)} complete rows; at least {FEWEST} are needed for a split")
    everything = np.concatenate(list(complete.values()))
    levels = {column: np.unique(everything[:, kept.index(column)])[1:] for column in CATEGORICAL}
    numbers = [column for column in kept if column not in (*CATEGORICAL, TARGET)]
    names = (*numbers, *(f"{column}_{level:g}" for column in CATEGORICAL for level in levels[column]))
    splits = {}
    for name, rows in complete.items():
        one_hot = [rows[:, [kept.index(column)]] == levels[column] for column in CATEGORICAL]
        features = np.concatenate([rows[:, [kept.index(column) for column in numbers]], *one_hot], axis=1)
        splits[name] = split(Part(features, (rows[:, kept.index(TARGET)] != 0).astype(np.int64)))
    return Hospitals(names, splits)


def split(whole: Part) -> Split:
    """66% to train, the rest to test, by scikit-learn's train_test_split with the published seed."""
    from sklearn.model_selection import train_test_split

    counts = np.bincount(whole.labels, minlength=2)
    train, test = train_test_split(
        np.arange(len(whole)),
        train_size=TRAIN_SHARE,
        random_state=SPLIT_SEED,
        stratify=whole.labels if counts.min() > 2 else None,
    )
    return Split(whole.rows(train), whole.rows(test))


def folds(hospitals: Hospitals, count: int, seed: int) -> list[Hospitals]:
    """Cross-validation inside each hospital's training rows: `count` times other rows to test; no test row is used."""
    dealt = {}
    for name, one in hospitals.splits.items():
        order = np.random.default_rng([seed, len(one.train)]).permutation(len(one.train))
        dealt[name] = np.array_split(order, count)
    return [
        Hospitals(
            hospitals.features,
            {
                name: Split(
                    one.train.rows(np.concatenate([*dealt[name][:fold], *dealt[name][fold + 1 :]])),
                    one.train.rows(dealt[name][fold]),
                )
                for name, one in hospitals.splits.items()
            },
        )
        for fold in range(count)
    ]


def _stacked(parts: list[Part]) -> Part:
    return Part(np.concatenate([part.features for part in parts]), np.concatenate([part.labels for part in parts]))
