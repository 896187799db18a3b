"""The question how a model of two classes scores the training rows: a histogram of its log-odds by label.

It is a statistic like any other. Each row is in one of 2 B cells, its label's bin, whatever the parameters that a
server sends are; so a row there or not moves the counts by one, the site's noise and charge are those of every release,
and a threshold that is read off them costs nothing more. The bins are fixed here, with open ends.

Legend: N examples, B bins.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import DataError
from fedclaw.learning.tasks.class_sums import bin_of
from fedclaw.privacy.statistics import Design, Records, StatisticColumn

SCORES = "scores"
SPAN = 8.0
"""Log-odds from which on a bin has no end: probabilities under 0.0003 and over 0.9997."""


def score_design(labels: Sequence[str], bins: int) -> Design:
    """The vector's design: the number of rows, and the counts of the 2 B cells. Raises DataError unless C = 2."""
    if len(labels) != 2:
        raise DataError(f"scores are of a model of two classes, and the schema has {len(labels)} labels")
    cells = tuple(f"{label}/{number}" for label in labels for number in range(bins))
    return Design([StatisticColumn(SCORES, levels=cells)], (), 0)


def edges(bins: int) -> NDArray[np.float64]:
    """Where one bin ends and the next begins, (B - 1,), in log-odds of the second class."""
    return np.linspace(-SPAN, SPAN, bins - 1)


def score_records(margins: NDArray[np.float64], targets: NDArray[np.int64], bins: int) -> Records:
    """Which cell each row is in, from its log-odds (N,) and label (N,); what is no number is in the first bin."""
    return Records({SCORES: (targets * bins + bin_of(margins, edges(bins))).astype(np.float64)}, targets)


def parameters_digest(parameters: Mapping[str, NDArray[np.float32]]) -> str:
    """SHA-256 of a model's parameters by name: whose scores they are."""
    digest = hashlib.sha256()
    for name, array in sorted(parameters.items()):
        digest.update(f"{name}/{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array, np.float32).tobytes())
    return digest.hexdigest()
