"""Versions published to a node that answers: ones that go wrong, ones that do not, and who gets them first.

Each trial has a model of its own, at which `cnn` answers, so that one trial's release tells nothing to another's.
"""

import json
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from experiments.chaos.stage import Finding, Stage
from experiments.serving.clients import Crowd, Outcome
from experiments.serving.servers import Node
from fedclaw.errors import FedClawError
from fedclaw.serve.bundle_archive import MEDIA_TYPE, pack
from fedclaw.serve.publish import AdminClient

ENDED = {"rolled_back", "answers"}
FIRST_SHARE = 0.05
CONFIDENCE = 0.999
"""Of the interval that each trial's share has to lie in: one of a thousand right ones falls out of it."""
LOOK_AGAIN = 0.1
CALM = 1.0
"""Seconds of load before a release, and after its end."""


@dataclass(frozen=True)
class Release:
    """One trial."""

    state: str
    """As the node says at its end; stuck: it came to none."""
    seconds: float
    says: str
    """In the node's words, with the numbers of its decision."""
    outcomes: Sequence[Outcome]
    candidate: str

    @property
    def touched(self) -> list[Outcome]:
        """Requests that the new version answered, or failed at."""
        return [outcome for outcome in self.outcomes if outcome.version == self.candidate or outcome.failed]


def publish(admin: AdminClient, model: str, bundle: Any) -> str:
    """Upload a bundle, without a release; the version's name."""
    answer = admin.ask("POST", f"/admin/models/{model}/versions", pack(bundle), MEDIA_TYPE)
    return str(answer["version"])


def begin(admin: AdminClient, model: str, version: str, mode: str = "canary") -> None:
    """Begin its release."""
    admin.ask("POST", f"/admin/models/{model}/release", {"version": version, "mode": mode})


def play(stage: Stage, node: Node, models: Sequence[str], bundles: Sequence[str], *, white: bool) -> list[Release]:
    """A canary at each model, at the same time, until each has come to its end."""
    admin, patience = stage.admin(node), stage.settings.patience
    clients = max(2, stage.settings.clients // len(models))
    crowds = [stage.crowd(node.url, model, white=white, clients=clients) for model in models]
    ends: dict[str, tuple[str, float, str]] = {}
    with ExitStack() as stack:
        for crowd in crowds:
            stack.enter_context(crowd)
        time.sleep(CALM)
        versions = [
            publish(admin, model, stage.foundry.bundle(bundle)) for model, bundle in zip(models, bundles, strict=True)
        ]
        for model, version in zip(models, versions, strict=True):
            begin(admin, model, version)
        began = time.monotonic()
        while len(ends) < len(models) and time.monotonic() - began < patience:
            for model in set(models) - set(ends):
                found = admin.ask("GET", f"/admin/models/{model}/release")
                if found["state"] in ENDED:
                    says = f"{found['says']}: {json.dumps(found['decision'])}"
                    ends[model] = (found["state"], time.monotonic() - began, says)
            time.sleep(LOOK_AGAIN)
        time.sleep(CALM)
    return [
        Release(*ends.get(model, ("stuck", patience, "")), _from(crowd, began), version)
        for model, crowd, version in zip(models, crowds, versions, strict=True)
    ]


def _from(crowd: Crowd, moment: float) -> list[Outcome]:
    return [outcome for outcome in crowd.outcomes if outcome.began >= moment]


def releases(stage: Stage, bundle: str, *, white: bool = False, distinct: bool = False) -> list[Release]:
    """As many canaries of `bundle` as trials; `distinct`: each from a bundle of its own."""
    trials = stage.settings.trials
    models = [f"model-{trial + 1}" for trial in range(trials)]
    bundles = [f"{bundle}-{trial + 1}" if distinct else bundle for trial in range(trials)]
    for name in bundles:
        stage.foundry.bundle(name)
    played: list[Release] = []
    with stage.node(models) as node:
        for first in range(0, trials, together := stage.settings.together):
            those = slice(first, first + together)
            played += play(stage, node, models[those], bundles[those], white=white)
            stage.say(f"{bundle}: {len(played)} of {trials}; {', '.join(one.state for one in played[those])}")
    return played


def errs(stage: Stage) -> Finding:
    """A canary that fails on what it is asked."""
    played = releases(stage, "errs", white=True)
    seen = [sum(outcome.failed for outcome in one.outcomes) for one in played]
    return told("a canary that errs", played, seen, "errors that users saw")


def slow(stage: Stage) -> Finding:
    """A canary that takes its time."""
    played = releases(stage, "slow")
    seen = [len(one.touched) for one in played]
    return told("a canary that is slow", played, seen, "requests that it answered")


def disagrees(stage: Stage) -> Finding:
    """A canary that gives other labels."""
    played = releases(stage, "disagrees")
    seen = [len(one.touched) for one in played]
    return told("a canary that disagrees", played, seen, "requests that it answered")


def told(name: str, played: Sequence[Release], seen: Sequence[int], what: str) -> Finding:
    """Of canaries that should be rolled back."""
    back = sum(one.state == "rolled_back" for one in played)
    asked = sum(len(one.outcomes) for one in played)
    seconds = [one.seconds for one in played]
    rows = [
        (
            f"{name}: rolled back",
            f"{back} of {len(played)}",
            f"after {statistics.median(seconds):.1f} s, worst {max(seconds):.1f} s",
        ),
        (
            f"{name}: {what}",
            f"{statistics.median(seen):g}",
            f"at most {max(seen)} in a trial, {sum(seen)} of {asked:,} in all",
        ),
    ]
    return Finding(
        rows,
        {
            f"{name}: trials": len(played),
            f"{name}: rolled back": back,
            f"{name}: seconds, median": round(statistics.median(seconds), 2),
            f"{name}: {what}, median": statistics.median(seen),
            f"{name}: {what}, worst": max(seen),
            f"{name}: asked": asked,
        },
    )


def identical(stage: Stage) -> Finding:
    """Canaries that compute what the stable version does, each from a run of its own."""
    played = releases(stage, "same", distinct=True)
    back = sum(one.state == "rolled_back" for one in played)
    done = sum(one.state == "answers" for one in played)
    why = "; ".join(one.says for one in played if one.state == "rolled_back")
    name = "identical canaries"
    rows = [
        (f"{name}: rolled back", f"{back} of {len(played)}", why or "reach: at most 1 of 20"),
        (
            f"{name}: came to answer all",
            f"{done} of {len(played)}",
            f"in {statistics.median(one.seconds for one in played):.0f} s",
        ),
    ]
    figures = {f"{name}: trials": len(played), f"{name}: rolled back": back, f"{name}: promoted": done}
    return Finding(rows, figures)


def first_share(stage: Stage) -> Finding:
    """How many of the distinct keys get a new version at first: too few of them ask for its share to grow meanwhile."""
    trials, keys = stage.settings.trials, stage.settings.keys
    models = [f"model-{trial + 1}" for trial in range(trials)]
    counts: list[int] = []
    changed = 0
    with stage.node(models) as node:
        for model in models:
            found, again, version = _first_keys(stage, node, model, keys)
            counts.append(sum(one == version for one in list(found.values())[:keys]))
            changed += sum(found.get(key, one) != one for key, one in again.items())
            stage.say(f"first share: {len(counts)} of {trials}")
    low, high = binomial_interval(keys, FIRST_SHARE, CONFIDENCE)
    outside = sum(not low <= count <= high for count in counts)
    shares = [count / keys for count in counts]
    name, spread = "the first 5%", f"{min(shares):.2%} to {max(shares):.2%} of {keys:,} keys"
    rows = [
        (f"{name}: share of the distinct keys", f"{statistics.fmean(shares):.2%}", spread),
        (f"{name}: trials out of the {CONFIDENCE:.1%} interval", f"{outside} of {trials}", f"{low} to {high} keys"),
        (f"{name}: keys that changed their version", str(changed), "reach: 0"),
    ]
    figures = {
        f"{name}: trials": trials,
        f"{name}: share": round(statistics.fmean(shares), 5),
        f"{name}: outside the interval": outside,
        f"{name}: keys that changed": changed,
    }
    return Finding(rows, figures)


def _first_keys(stage: Stage, node: Node, model: str, keys: int) -> tuple[dict[str, str], dict[str, str], str]:
    """(version by key, the same of some of the keys asked again, the new version)."""
    admin = stage.admin(node)
    version = publish(admin, model, stage.foundry.bundle("same"))
    begin(admin, model, version)
    with stage.crowd(node.url, model, pause=0.0) as crowd:
        crowd.wait_for(
            lambda outcomes: any(outcome.version == version for outcome in outcomes), stage.settings.patience
        )
    with stage.crowd(node.url, model, pause=0.0) as crowd:
        crowd.wait_for(lambda outcomes: sum(outcome.good for outcome in outcomes) >= keys, stage.settings.patience)
    with replace(crowd, outcomes=[], acknowledged=[]) as again:
        again.wait_for(lambda outcomes: len(outcomes) >= keys // 4, stage.settings.patience)
    found = admin.ask("GET", f"/admin/models/{model}/release")
    if f"{FIRST_SHARE:.0%} of the keys" not in found["says"]:
        told = f"{found['says']}: {json.dumps(found['decision'])}"
        raise FedClawError(f"the share did not stay while the keys asked, so give fewer keys: {told}")
    return _versions(crowd), _versions(again), version


def _versions(crowd: Crowd) -> dict[str, str]:
    return {outcome.key: outcome.version for outcome in crowd.outcomes if outcome.good}


def binomial_interval(count: int, share: float, confidence: float) -> tuple[int, int]:
    """The smallest interval of successes, cut off at equal tails, that holds so much of Binomial(count, share)."""
    tail, below = (1 - confidence) / 2, 0.0
    low, high = 0, count
    for successes in range(count + 1):
        ways = math.lgamma(count + 1) - math.lgamma(successes + 1) - math.lgamma(count - successes + 1)
        chance = math.exp(ways + successes * math.log(share) + (count - successes) * math.log1p(-share))
        if below <= tail:
            low = successes
        below += chance
        if below >= 1 - tail:
            high = successes
            break
    return low, high
