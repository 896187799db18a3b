"""A site against a coordinator that asks for whatever combination, in whatever order, on neighbouring data sets.

`tests.neighbours` says what is compared. Here is what is asked: every installed strategy, under every mechanism and
weighting, with every lie about what is personal; and after one or two rounds of another kind, some of them asked while
the site's policy still allowed training without privacy, so that there is state of every kind. The coordinator does not
ask itself first whether it is right to ask.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from fedclaw.learning.registry import strategy_class
from fedclaw.learning.strategy import Strategy, is_overridden
from tests.neighbours import (
    COMPRESSIONS,
    EXAMPLES,
    MECHANISMS,
    TASKS,
    WEIGHTINGS,
    Asked,
    Coupled,
    complaints,
    left_of,
    open_site,
)
from tests.neighbours import strategies as installed_strategies

LIES = ("honest", "head", "none", "all")
LOUD = {"rate": 1e-6, "amplify": 9e6}
"""A local learning rate with which nothing of a step leaves but what was kept, and fields that make the most of it."""
STRONG = {"rate": 50.0}
"""One with which every update is as long as it may be, and what stays at the site is far from where it began."""


def keeps(name: str) -> bool:
    """Whether a site has something of that strategy's from round to round."""
    strategy = strategy_class(name)
    return bool(strategy.client_state or strategy.personal_model or strategy.personal is not Strategy.personal)


def is_quiet(name: str) -> bool:
    """Whether a site of that strategy does what FedAvg's does."""
    halves = ("correct_gradients", "correct_personal_gradients", "client_update", "extras")
    return not keeps(name) and not any(is_overridden(strategy_class(name), half) for half in halves)


STRATEGIES = installed_strategies()
KEEPING = [name for name in STRATEGIES if keeps(name)]
BUSY = [name for name in STRATEGIES if not is_quiet(name)]


def ask(strategy: str, mechanism: str, kind: str = "train", **how) -> Asked:
    """With a weighting that goes with the mechanism, if none is said."""
    weighting = "examples" if mechanism.startswith("example") else "uniform"
    return Asked(strategy, mechanism, kind, **{"weighting": weighting, **how})


def nothing_is_told(*sequences: Sequence[Asked], before: Sequence[Asked] = (), declared: int | None = None) -> None:
    found = [complaint for asked in sequences for complaint in complaints(asked, before, declared=declared)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_question(strategy: str) -> None:
    mechanisms = ("local", "example-server", "site-server") if is_quiet(strategy) else MECHANISMS
    nothing_is_told(*([ask(strategy, mechanism)] for mechanism in mechanisms), [ask(strategy, "site-server", **STRONG)])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_question_where_the_number_of_examples_is_declared(strategy: str) -> None:
    """The example is there or not (add or remove), beside the declared number, which is right for one of the two."""
    mechanisms = ("local",) if is_quiet(strategy) else ("local", "local-secure", "example-server", "site-server")
    nothing_is_told(*([ask(strategy, mechanism)] for mechanism in mechanisms), declared=EXAMPLES)
    if strategy == "fedavg":
        units = product(MECHANISMS, ("example", "person"))
        nothing_is_told(*([ask(strategy, mechanism, unit=unit)] for mechanism, unit in units), declared=EXAMPLES)


@pytest.mark.parametrize("mechanism", ["local", "example-server", "site-sites"])
def test_one_question_of_another_task(mechanism: str) -> None:
    for strategy in ("fedavg", "scaffold", "qfedavg", "fedper", "ditto"):
        nothing_is_told([ask(strategy, mechanism, task="number")])
    nothing_is_told([ask("fedper", mechanism, task="number"), ask("fedper", "local", "evaluate", task="number")])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_question_about_persons(strategy: str) -> None:
    mechanisms = ("local", "example-server") if is_quiet(strategy) else MECHANISMS
    nothing_is_told(
        *([ask(strategy, mechanism, unit="person")] for mechanism in mechanisms),
        [ask(strategy, "site-server", unit="person", **STRONG)],
    )


@pytest.mark.parametrize("strategy", KEEPING)
def test_what_is_kept_of_persons(strategy: str) -> None:
    raw, noised, summed = (ask(strategy, mechanism, unit="person") for mechanism in ("none", "local", "site-server"))
    nothing_is_told([ask(strategy, "local", unit="person", **LOUD)], before=[raw])
    nothing_is_told([summed, noised, ask(strategy, "local", "evaluate", unit="person")])


@pytest.mark.parametrize("strategy", KEEPING)
def test_a_round_after_one_of_another_kind(strategy: str) -> None:
    other = KEEPING[(KEEPING.index(strategy) + 1) % len(KEEPING)]
    raw, noised, summed = (ask(strategy, mechanism) for mechanism in ("none", "local", "site-server"))
    nothing_is_told([ask(strategy, "local", **LOUD)], [noised], [ask(strategy, "local", "evaluate")], before=[raw])
    nothing_is_told(
        [summed, ask(strategy, "local", **LOUD)],
        [summed, noised],
        [summed, ask(strategy, "site-server", "evaluate")],
        [summed, ask(strategy, "local", "evaluate")],
        [ask(strategy, "example-server", **STRONG), ask(strategy, "example-server", **STRONG)],
        [noised, ask(strategy, "local", "evaluate"), ask(strategy, "local", personal="head")],
        [noised, ask(other, "local"), ask(other, "local", "evaluate")],
    )


@pytest.mark.parametrize("lie", LIES)
def test_what_a_plan_calls_personal(lie: str) -> None:
    for mechanism in ("example-server", "example-sites", "site-server"):
        once = ask("fedavg", mechanism, personal=lie, **STRONG)
        nothing_is_told([once, once, ask("fedavg", "local", personal=lie)])


@pytest.mark.parametrize("compression", ["topk", "powersgd"])
def test_what_compression_remembers(compression: str) -> None:
    raw = ask("fedavg", "none", compression=compression)
    nothing_is_told([ask("fedavg", "local", compression=compression, rate=1e-6)], before=[raw])
    once = ask("fedavg", "local", compression=compression)
    nothing_is_told([once, once])


def sampled(seed: int, length: int) -> tuple[list[Asked], list[Asked]]:
    """What was asked while training without privacy was allowed (mostly nothing), and so many questions after it."""
    draw = random.Random(seed)
    names = draw.choices(KEEPING, k=1) if draw.random() < 0.5 else draw.choices(BUSY, k=2)

    def one(mechanisms: Sequence[str]) -> Asked:
        how = {"rate": draw.choice((1e-6, 0.5, 0.5, 50.0)), "amplify": draw.choice((1.0, 1.0, 9e6))}
        how |= {"personal": draw.choice(LIES)} if draw.random() < 0.2 else {}
        how |= {"compression": draw.choice(list(COMPRESSIONS))} if draw.random() < 0.2 else {}
        how |= {"weighting": draw.choice(WEIGHTINGS)} if draw.random() < 0.2 else {}
        how |= {"round": draw.randint(1, 3)} if draw.random() < 0.2 else {}
        return ask(draw.choice(names), draw.choice(mechanisms), draw.choice(("train", "train", "evaluate")), **how)

    before = [one(("none", "site-server"))] if draw.random() < 0.4 else []
    asked = [one(MECHANISMS) for _ in range(length)]
    of = {"task": "number" if seed % 4 == 3 else "classes", "unit": "person" if seed % 3 == 2 else "example"}
    return [replace(question, **of) for question in before], [replace(question, **of) for question in asked]


def test_any_three_questions() -> None:
    for seed in range(16):
        before, asked = sampled(seed, 3 - seed % 2)
        nothing_is_told(asked, before=before)


def test_what_is_compared_can_differ() -> None:
    """The example does move what is noised, by as much as it may; and without noise it is seen."""
    with_it, without = Coupled(present=True), None
    site = open_site(with_it, present=True)
    left = left_of(site, ask("fedavg", "local"), 1)
    without = Coupled(present=False, of=with_it.noised)
    same = left_of(open_site(without, present=False), ask("fedavg", "local"), 1)
    moved = [float(np.linalg.norm(a.before - b.before)) for a, b in zip(left.noised, same.noised, strict=True)]
    assert max(moved) * left.multiplier / left.noised[0].std == pytest.approx(1, abs=1e-3)
    summed = ask("fedavg", "example-server")
    sides = [left_of(open_site(Coupled(present=here), present=here), summed, 1) for here in (True, False)]
    names = sides[0].on_the_sum
    moved = [float(np.sum((sides[0].on_the_sum[name] - sides[1].on_the_sum[name]) ** 2)) for name in names]
    assert np.sqrt(sum(moved)) == pytest.approx(sides[0].bound, rel=1e-3)
    person = ask("fedavg", "example-server", unit="person")
    sides = [
        left_of(open_site(Coupled(present=here), present=here, unit="person"), person, 1) for here in (True, False)
    ]
    names = sides[0].on_the_sum
    moved = [float(np.sum((sides[0].on_the_sum[name] - sides[1].on_the_sum[name]) ** 2)) for name in names]
    assert np.sqrt(sum(moved)) == pytest.approx(sides[0].bound, rel=1e-3)
    raw = []
    for here in (True, False):
        site = open_site(Coupled(present=here), present=here)
        site.policy = site.policy.model_copy(update={"allow_training_without_privacy": True})
        raw.append(left_of(site, ask("fedavg", "none"), 1).rest["arrays"])
    assert any(not np.array_equal(raw[0][name], raw[1][name]) for name in raw[0])


# The full product, by `make test-slow`.


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_single_question(strategy: str, task: str) -> None:
    nothing_is_told(
        *(
            [Asked(strategy, mechanism, weighting=weighting, personal=lie, task=task)]
            for mechanism, weighting, lie in product(MECHANISMS, WEIGHTINGS, LIES)
        ),
        *(
            [ask(strategy, mechanism, kind, compression=compression, task=task)]
            for mechanism, kind, compression in product(MECHANISMS, ("train", "evaluate"), COMPRESSIONS)
        ),
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_single_question_where_the_number_of_examples_is_declared(strategy: str, task: str) -> None:
    nothing_is_told(
        *(
            [ask(strategy, mechanism, task=task), ask(strategy, mechanism, kind, task=task)]
            for mechanism, kind in product(MECHANISMS, ("train", "evaluate"))
        ),
        *(2 * [ask(strategy, "local", compression=compression, task=task)] for compression in COMPRESSIONS),
        declared=EXAMPLES,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", KEEPING)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_question_after_a_round_that_left_something(first: str, mechanism: str) -> None:
    others = [*BUSY, "fedavg"]
    seconds = [ask(name, after, **how) for name, after, how in product(others, MECHANISMS, (LOUD, {}))]
    seconds += [ask(name, after, "evaluate") for name, after in product(others, ("local", "site-server"))]
    one = ask(first, mechanism)
    if mechanism in ("none", "site-server"):
        for second in seconds:
            nothing_is_told([second], before=[one])
    nothing_is_told(*([one, second] for second in seconds))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(8))
def test_many_sequences_of_three(part: int) -> None:
    for seed in range(1000 + 250 * part, 1250 + 250 * part):
        before, asked = sampled(seed, 3)
        nothing_is_told(asked, before=before)
