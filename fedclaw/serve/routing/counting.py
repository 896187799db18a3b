"""What workers count of each version, and under which names it lies in the state store.

| scope | name | what |
| --- | --- | --- |
| `MODEL` | `calls`, `errors`, `ignored` | calls; those that failed by the version's fault; refused, and not its fault |
| | `lB` | answers of latency bucket B |
| | `gG.calls`, `gG.errors` | of clients of group G, for the breaker |
| | `tripped.G` | workers that opened the breaker for group G (-1: for everybody) by themselves |
| | `bE.gG.calls`, `bE.gG.errors` | probes in a half-open breaker's epoch E |
| `MODEL@EPOCH` | `gG.keys`, `gG.errors` | of keys that are new in this epoch, their first call |
| | `gG.lB` | of one such key in each push of a worker |
| | `gG.compared`, `gG.disagreed` | of keys that are new, one row of the first request that two versions answered |

Calls of one routing key are alike, so tests count each key once in an epoch, whichever worker sees it. A principal
makes up as many keys as it likes, so keys are counted by group of principals.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fedclaw.serve.refusals import CLIENT_CODES, Code

GROUPS = 16
"""Groups of clients. Two clients share one with a chance of 1/16."""
BUCKETS = 96
"""Latency buckets, four to a doubling, from 10 us to 168 s."""
NO_FAULT: frozenset[Code] = CLIENT_CODES | {"overloaded", "too_many_requests", "deadline_exceeded", "not_supported"}
"""Refusals that are no fault of the version."""
_FIRST = 1e-5
_FINENESS = 4
_SCALE = 1.0 / _FIRST


class Calls(NamedTuple):
    """Calls that ended, and those of them that failed by the version's fault."""

    calls: int = 0
    errors: int = 0


_NONE = Calls()


def total(by_group: Mapping[int, Calls]) -> Calls:
    """Of all clients."""
    return Calls(sum(one.calls for one in by_group.values()), sum(one.errors for one in by_group.values()))


def add_calls(parts: Iterable[Mapping[int, Calls]]) -> dict[int, Calls]:
    """Added up by group."""
    sums: dict[int, Calls] = {}
    for part in parts:
        for group, more in part.items():
            had = sums.get(group, _NONE)
            sums[group] = Calls(had.calls + more.calls, had.errors + more.errors)
    return sums


def group_of(principal: str) -> int:
    """In [0, GROUPS)."""
    return hashlib.blake2b(principal.encode("utf-8", "surrogatepass"), digest_size=1).digest()[0] % GROUPS


def bucket_of(seconds: float) -> int:
    """The latency bucket, in [0, BUCKETS)."""
    if seconds <= _FIRST:
        return 0
    bucket = int(math.log2(seconds * _SCALE) * _FINENESS)
    return bucket if bucket < BUCKETS else BUCKETS - 1


def upper_edge(bucket: int) -> float:
    """Seconds that no latency in the bucket exceeds; of the last bucket, infinity."""
    return math.inf if bucket == BUCKETS - 1 else _FIRST * 2.0 ** ((bucket + 1) / _FINENESS)


def calls_by_group(counts: Mapping[str, int], epoch: int | None = None) -> dict[int, Calls]:
    """From one version's counts: all calls, or the probes of a half-open epoch."""
    start = "" if epoch is None else f"b{epoch}."
    found = {
        group: Calls(counts.get(f"{start}g{group}.calls", 0), counts.get(f"{start}g{group}.errors", 0))
        for group in range(GROUPS)
    }
    return {group: calls for group, calls in found.items() if calls.calls}


def trips_by_group(counts: Mapping[str, int]) -> dict[int, int]:
    """How many workers opened one version's breaker by themselves, by whom for; -1: for everybody."""
    found = {group: counts.get(f"tripped.{group}", 0) for group in range(-1, GROUPS)}
    return {group: trips for group, trips in found.items() if trips}


def quantile_bucket(histogram: Mapping[int, int], quantile: float) -> int | None:
    """The bucket that holds the quantile; None of an empty histogram."""
    left = quantile * sum(histogram.values())
    for bucket in sorted(histogram):
        left -= histogram[bucket]
        if left <= 0:
            return bucket
    return None


def sum_counts(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Added up by name."""
    sums: dict[str, int] = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0) + value
    return sums
