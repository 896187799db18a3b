"""What a worker counted and has not told the state store yet.

Calls are sums: while the store is away they pile up, and do not grow. For a canary's tests keys are counted, each once
in an epoch, and of those that are new to this worker since the last push a uniform sample: of each version and group of
clients a few, and of each version one latency.

While two versions are compared, keys count in pairs, one of each version, of the same group of clients and from the
same push, or else the last one before. By themselves samples of a few would tell two equal versions apart: the stable
version would show a latency in each push, a canary with few keys in the busy ones alone, where all is slower.
"""

import random
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Protocol

from fedclaw.serve.routing.choosing import VersionChooser
from fedclaw.serve.routing.counting import BUCKETS, GROUPS, Calls, sum_counts

_KEYS_PER_PUSH = 4  # Of each group and version: a burst of calls that fail together counts a few times, not often.
_HOUR = 3600
_SampledKey = tuple[str, tuple[str, ...]]
_MOST_KEYS = 100_000


class CountStore(Protocol):
    """What counts need of a state store."""

    def add_counts(self, model: str, version: str, bucket: int, counts: Mapping[str, int]) -> None: ...  # noqa: D102

    def claim(self, scope: str, keys: Iterable[str]) -> set[str]: ...  # noqa: D102


class _Tally:
    """What was counted of one version since the last push."""

    __slots__ = ("calls", "errors", "group_calls", "group_errors", "ignored", "latencies", "other")

    def __init__(self) -> None:
        self.calls = self.errors = self.ignored = 0
        self.latencies = [0] * BUCKETS
        self.group_calls = [0] * GROUPS
        self.group_errors = [0] * GROUPS
        self.other: dict[str, int] = {}

    def count(self, name: str) -> None:
        """One more."""
        self.other[name] = self.other.get(name, 0) + 1

    def counts(self) -> dict[str, int]:
        """By name."""
        named = {"calls": self.calls, "errors": self.errors, "ignored": self.ignored, **self.other}
        named |= {f"l{bucket}": count for bucket, count in enumerate(self.latencies)}
        named |= {f"g{group}.calls": count for group, count in enumerate(self.group_calls)}
        named |= {f"g{group}.errors": count for group, count in enumerate(self.group_errors)}
        return {name: count for name, count in named.items() if count}

    def by_group(self) -> dict[int, Calls]:
        """Of each group that called."""
        pairs = enumerate(zip(self.group_calls, self.group_errors, strict=True))
        return {group: Calls(*pair) for group, pair in pairs if pair[0]}


class _Sample:
    """Keys that were new to this worker since the last push, of one version, group and kind: a uniform sample."""

    __slots__ = ("keys", "offered")

    def __init__(self) -> None:
        self.keys: list[tuple[str, tuple[str, ...]]] = []
        """What the key is claimed as, and the names that go up by one with it."""
        self.offered = 0

    def offer(self, claimed: str, names: tuple[str, ...]) -> None:
        """By reservoir sampling, which knows nothing of what came of the call."""
        self.offered += 1
        if len(self.keys) < _KEYS_PER_PUSH:
            self.keys.append((claimed, names))
        elif (place := random.randrange(self.offered)) < _KEYS_PER_PUSH:  # noqa: S311
            self.keys[place] = (claimed, names)


class UnsentCounts:
    """One worker's. Safe for many threads; one of them sends."""

    def __init__(self, store: CountStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._tallies: dict[tuple[str, str], _Tally] = {}
        self._unsent: dict[tuple[str, str, int], dict[str, int]] = {}
        self._samples: dict[tuple[str, str, int, str], _Sample] = {}
        self._sampled: dict[tuple[str, str], list[_SampledKey]] = {}
        self._compared: dict[str, tuple[str, str]] = {}
        self._unpaired: dict[tuple[str, str, int], deque[_SampledKey]] = {}
        self._seen: dict[str, set[int]] = {}

    def count_call(self, model: str, version: str, group: int, bucket: int | None, ignored: bool) -> None:
        """One call of a client of the group: answered, in that latency bucket; or failed, or refused and `ignored`."""
        with self._lock:
            tally = self._tallies.get((model, version))
            if tally is None:
                tally = self._tallies[model, version] = _Tally()
            if ignored:
                tally.ignored += 1
            else:
                tally.calls += 1
                tally.group_calls[group] += 1
                if bucket is None:
                    tally.errors += 1
                    tally.group_errors[group] += 1
                else:
                    tally.latencies[bucket] += 1

    def count(self, model: str, version: str, *names: str) -> None:
        """One more of each name."""
        with self._lock:
            tally = self._tallies.setdefault((model, version), _Tally())
            for name in names:
                tally.count(name)

    def calls(self, model: str, version: str) -> dict[int, Calls]:
        """Of each group, since the last `take`."""
        with self._lock:
            tally = self._tallies.get((model, version))
            return {} if tally is None else tally.by_group()

    def offer(
        self, chooser: VersionChooser, version: str, group: int, kind: str, key: str, names: tuple[str, ...]
    ) -> None:
        """A key for the sample, unless this worker has seen it in the epoch: if it is drawn and new to the store, the
        names go up by one. `kind` tells calls (k) from mirrored requests (m)."""
        unit, scope = chooser.hash.position(key).unit, chooser.scope
        with self._lock:
            seen = self._seen.get(scope)
            if seen is None:
                self._begin(chooser)
                seen = self._seen[scope] = set()
            if (unit if kind == "k" else ~unit) in seen:
                return
            if len(seen) >= _MOST_KEYS:
                seen.clear()
            seen.add(unit if kind == "k" else ~unit)
            sample = self._samples.setdefault((scope, version, group, kind), _Sample())
            sample.offer(f"{kind}{unit:016x}", tuple(f"g{group}.{name}" for name in names))

    def take(self, now: float) -> dict[tuple[str, str], dict[int, Calls]]:
        """Make ready to be sent what was counted until now. Returns the calls, by model and version, and group."""
        with self._lock:
            tallies, self._tallies = self._tallies, {}
            samples, self._samples = self._samples, {}
            compared = dict(self._compared)
        self._sampled = {}
        for scope, versions in compared.items():
            self._pair(scope, versions, samples)
        for place, keys in _by_version(samples).items():
            self._sampled.setdefault(place, []).extend(_with_one_latency(keys))
        for (model, version), tally in tallies.items():
            self._add((model, version, int(now)), tally.counts())
        return {place: tally.by_group() for place, tally in tallies.items() if tally.calls}

    def send(self, now: float) -> None:
        """Send what was taken. Raises StateUnavailable: then counts are sent the next time, and samples never."""
        self._send()
        sampled, self._sampled = self._sampled, {}
        for (scope, version), keys in sampled.items():
            new = self._store.claim(scope, [claimed for claimed, _ in keys])
            counts = sum_counts(dict.fromkeys(names, 1) for claimed, names in keys if claimed in new)
            self._add((scope, version, int(now) // _HOUR * _HOUR), counts)
        self._send()

    def _begin(self, chooser: VersionChooser) -> None:
        """Forget the model's epochs before this one."""
        plan = chooser.plan
        for old in [one for one in self._seen if one.rpartition("@")[0] == plan.model]:
            del self._seen[old]
            self._compared.pop(old, None)
        if plan.candidate is not None and plan.mode == "canary" and plan.share < 1.0:
            self._compared[chooser.scope] = (plan.stable, plan.candidate)

    def _pair(self, scope: str, versions: tuple[str, str], samples: dict[tuple[str, str, int, str], _Sample]) -> None:
        """Move the sampled keys of two versions that make pairs; the last ones that are left over wait for others."""
        for old in [one for one in self._unpaired if one[0] not in self._compared]:
            del self._unpaired[old]
        pairs: list[tuple[_SampledKey, ...]] = []
        for group in {group for of, _, group, kind in samples if (of, kind) == (scope, "k")}:
            waiting = [self._unpaired.setdefault((scope, own, group), deque(maxlen=_KEYS_PER_PUSH)) for own in versions]
            for version, keys in zip(versions, waiting, strict=True):
                if (sample := samples.pop((scope, version, group, "k"), None)) is not None:
                    keys.extend(sample.keys)
            pairs += [tuple(keys.pop() for keys in waiting) for _ in range(min(map(len, waiting)))]
        timed = [place for place, pair in enumerate(pairs) if all(_is_latency(names[-1]) for _, names in pair)]
        kept = random.choice(timed) if timed else -1  # noqa: S311
        for place, pair in enumerate(pairs):
            for version, (claimed, names) in zip(versions, pair, strict=True):
                told = names if place == kept or not _is_latency(names[-1]) else names[:-1]
                self._sampled.setdefault((scope, version), []).append((claimed, told))

    def _add(self, place: tuple[str, str, int], counts: Mapping[str, int]) -> None:
        if counts:
            self._unsent[place] = sum_counts((self._unsent.get(place, {}), counts))

    def _send(self) -> None:
        while self._unsent:
            (model, version, bucket), counts = next(iter(self._unsent.items()))
            self._store.add_counts(model, version, bucket, counts)
            del self._unsent[model, version, bucket]


def _by_version(
    samples: Mapping[tuple[str, str, int, str], _Sample],
) -> dict[tuple[str, str], list[_SampledKey]]:
    joined: dict[tuple[str, str], list[_SampledKey]] = {}
    for (scope, version, _, _), sample in samples.items():
        joined.setdefault((scope, version), []).extend(sample.keys)
    return joined


def _with_one_latency(keys: list[_SampledKey]) -> list[_SampledKey]:
    """Of one latency, drawn by lot: requests of a batch, or of a stall, are slow together."""
    timed = [place for place, (_, names) in enumerate(keys) if _is_latency(names[-1])]
    kept = random.choice(timed) if timed else -1  # noqa: S311
    return [
        (claimed, names if place == kept or place not in timed else names[:-1])
        for place, (claimed, names) in enumerate(keys)
    ]


def _is_latency(name: str) -> bool:
    return name.partition(".")[2].startswith("l")
