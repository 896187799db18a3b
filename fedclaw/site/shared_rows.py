"""Test rows that are training rows: an exact metric of one is a metric of a training example, which no epsilon covers.

Rows are compared by value, inputs and target, as they are before a server's constants come into it: which are equal
must not depend on what a server sends. Any that are equal count, for chance cannot be told from a split that was made
after rows were copied; where people differ and rows do not (a few categories), the operator says so
(`maximum_shared_test_rows`).
"""

import secrets

import numpy as np
from numpy.typing import NDArray

from fedclaw.learning.tasks.base import Targets
from fedclaw.learning.workload import Table
from fedclaw.site.policy.policy import Policy

_BLOCK = 1 << 22
"""Numbers that are digested at a time."""


def shared_rows(train: Table, test: Table | None) -> int:
    """How many rows of `test` have the values and the label of some row of `train`.

    An exact metric of such a row is a metric of a training example, which no epsilon covers. Rows are compared as they
    are before a server's constants come into it: which are equal must not depend on what a server sends. Any that are
    equal count, for chance cannot be told from a split that was made after rows were copied; where people differ and
    rows do not (a few categories), the operator says so (`maximum_shared_test_rows`).
    """
    if test is None or 0 in (len(train), len(test)) or train.inputs.shape[1:] != test.inputs.shape[1:]:
        return 0
    width = int(np.prod(train.inputs.shape[1:], dtype=np.int64)) + 2
    seed = np.random.default_rng(secrets.randbits(128))
    factors = seed.integers(0, 1 << 63, size=(width, 2), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    known = set(_digests(train, factors))
    return sum(digest in known for digest in _digests(test, factors))


def _digests(table: Table, factors: NDArray[np.uint64]) -> list[bytes]:
    """Of each row 128 bits: two sums of its 32-bit words times random odd factors, modulo 2^64 (multilinear hashing).

    Two different rows have the same by chance with a probability of at most 2^-66, whatever is in them.
    """
    count = len(table)
    inputs, targets = table.inputs.reshape(count, -1), _words(table.targets)
    rows = max(1, _BLOCK // factors.shape[0])
    found: list[bytes] = []
    for begin in range(0, count, rows):
        # Adding 0 makes -0 to 0, which is the same value.
        values = np.ascontiguousarray(inputs[begin : begin + rows].astype(np.float32) + np.float32(0)).view(np.uint32)
        words = np.concatenate([values, targets[begin : begin + rows]], axis=1)
        with np.errstate(over="ignore"):
            sums = [(words.astype(np.uint64) * factors[:, half]).sum(axis=1, dtype=np.uint64) for half in (0, 1)]
        found += np.stack(sums, axis=1).view("V16").ravel().tolist()
    return found


def _words(targets: Targets) -> NDArray[np.uint32]:
    """(N, 2): the same for equal targets alone, be they classes or numbers."""
    whole = np.issubdtype(targets.dtype, np.integer)
    values = targets.astype(np.int64) if whole else targets.astype(np.float64) + 0.0
    return np.ascontiguousarray(values.reshape(-1, 1)).view(np.uint32)


def are_held_out(policy: Policy, shared: int, examples: int) -> bool:
    """Whether `policy` takes test data of so many examples, of which `shared` are training rows, for held out.

    Where training without privacy is allowed, nothing that an exact metric tells is protected.
    """
    return policy.allow_training_without_privacy or shared <= policy.maximum_shared_test_rows * examples


def note_on_shared_rows(policy: Policy, shared: int, examples: int) -> str | None:
    """What the site's operator should know of so many shared rows; it counts, so it never leaves the site."""
    if not shared:
        return None
    known = f"{shared} of {examples} test rows are training rows (the same values and label)"
    if are_held_out(policy, shared, examples):
        return f"{known}, which the policy allows: exact metrics of training examples leave"
    if policy.metrics_epsilon is not None:
        return f"{known}: metrics are charged to the training data's budget"
    return (
        f"{known}: no metrics leave. Take them out of one of the two; or set metrics_epsilon, for metrics with noise "
        "on the training data's budget; or maximum_shared_test_rows, if they are of different people"
    )
