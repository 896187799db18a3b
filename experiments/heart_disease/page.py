"""docs/heart_disease.md, from the results: every measured number in it is one of theirs."""

from collections.abc import Sequence

from experiments.heart_disease import words
from experiments.heart_disease.published import BEST_FEDERATED, PRIVATE, PUBLISHED, Published
from experiments.heart_disease.results import Results, Row
from experiments.heart_disease.search import Tried
from experiments.heart_disease.settings import Method, Placement, PrivateMethod
from experiments.markdown import filled

_NOISE: dict[Placement, str] = {"distributed": "all hospitals', in shares", "local": "each hospital's own"}
_TRUST = {"aggregation": "enough of the other hospitals", "nobody": "nobody"}
_SHOWN = 6
"""Candidates of a search that the page has."""


def render(results: Results, image: str) -> str:
    """The page as Markdown; `image` is the plot's file name beside it."""
    parts = [words.INTRODUCTION.format(sizes=_sizes(results), seeds=_seeds(results), image=image)]
    if results.quick:
        parts.append(words.QUICK)
    parts += [words.PUBLISHED, _published(results), _differences(results)]
    if shared := results.of("shared"):
        parts += [words.SHARED, _shared(shared), _recipe(results)]
    if private := results.of("private"):
        parts += [words.PRIVATE.format(delta=private[0].delta, published=PRIVATE), _private(private)]
        parts += [_private_settings(results, private)]
    parts.append(words.LIMITS)
    return filled(parts)


def _sizes(results: Results) -> str:
    return ", ".join(f"{name.capitalize()} {train}/{test}" for name, (train, test) in results.sizes.items())


def _seeds(results: Results) -> str:
    seeds = results.rows[0].seeds
    return f"the seed {seeds[0]}" if len(seeds) == 1 else f"the seeds {', '.join(map(str, seeds))}"


def _published(results: Results) -> str:
    body = []
    for row in results.of("published"):
        if (known := PUBLISHED.get(row.name)) is None:
            continue
        inside = "yes" if row.within else "**no**"
        body.append(
            [
                row.name,
                f"{known.mean:.2f} ± {known.deviation:.2f}",
                _mean(row),
                inside,
                "-" if known.pooled is None else f"{known.pooled:.1f}",
                _number(row.pooled),
            ]
        )
    head = ["method", "published", "FedClaw", "within one deviation", "published, all test rows", "FedClaw, all"]
    return _table(head, body, left=1)


def _differences(results: Results) -> str:
    parts = [words.PROTOCOL]
    cyclic, first = results.find("published", "cyclic"), results.find("published", "first")
    if cyclic and first:
        parts.append(words.CYCLIC.format(**_pair(cyclic, PUBLISHED["cyclic"]), alone=_mean(first), **_all(first)))
    scaffold, fedavg = results.find("published", "scaffold"), results.find("published", "fedavg")
    if scaffold and fedavg:
        told = {"fedavg": _mean(fedavg), "fedavg_pooled": _number(fedavg.pooled)}
        parts.append(words.SCAFFOLD.format(**_pair(scaffold, PUBLISHED["scaffold"]), **told))
    parts.append(words.ADAPTIVE)
    outside = [row.name for row in results.of("published") if row.within is False]
    if outside:
        parts.append(f"Outside of one published deviation: {', '.join(outside)}.")
    return "\n\n".join(part.strip("\n") for part in parts)


def _pair(row: Row, known: Published) -> dict[str, str]:
    return {
        "ours": _mean(row),
        "ours_pooled": _number(row.pooled),
        "theirs": f"{known.mean:.2f}",
        "theirs_pooled": "-" if known.pooled is None else f"{known.pooled:.1f}",
    }


def _all(row: Row) -> dict[str, str]:
    return {"alone_pooled": _number(row.pooled)}


def _shared(rows: Sequence[Row]) -> str:
    body = [[row.name, _mean(row), _number(row.pooled)] for row in rows]
    return _table(["method", "mean of hospitals", "all test rows"], body, left=1)


def _recipe(results: Results) -> str:
    recipe = results.find("shared", "recipe")
    if recipe is None:
        return ""
    text = words.RECIPE.format(
        settings=_method(recipe.method),
        mean=_mean(recipe),
        best=BEST_FEDERATED,
        gain=recipe.mean - BEST_FEDERATED,
        centres=", ".join(f"{name.capitalize()} {value:.1f}" for name, value in recipe.centres.items()),
    )
    if results.search is None:
        return text
    return text + "\n" + words.RECIPE_SEARCH + "\n" + _tried(results.search.recipe)


def _method(method: Method) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in method.strategy.items() if key != "name")
    training = method.training
    return (
        f"strategy `{method.strategy['name']}`{f' ({settings})' if settings else ''}, {method.rounds} rounds of "
        f"{training.steps} steps with batches of {training.batch_size} and learning rate {training.learning_rate:g}, "
        f"weighting: {method.weighting}"
    )


def _private(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        spending, placement = row.spending, row.placement
        assert spending is not None
        assert placement is not None
        body.append(
            [
                _NOISE[placement],
                _TRUST.get(spending.trust, spending.trust),
                f"{row.epsilon:g}",
                f"{spending.statistics:.3f}",
                f"{spending.training:.3f}",
                f"{spending.together:.3f}",
                _mean(row),
                _number(row.pooled),
            ]
        )
    head = [
        *("noise", "trusts", "budget", "statistics", "training", "together, ledger"),
        *("mean of hospitals", "all test rows"),
    ]
    return _table(head, body, left=2)


def _private_settings(results: Results, rows: Sequence[Row]) -> str:
    used: dict[Placement, PrivateMethod] = {row.placement: row.private for row in rows if row.placement and row.private}
    body = [
        [_NOISE[placement], str(one.rounds), f"{one.learning_rate:g}", f"{one.clip:g}", f"{one.sample_rate:g}"]
        for placement, one in used.items()
    ]
    parts = [words.PRIVATE_READING, _table(["noise", "rounds", "learning rate", "clip", "sample rate"], body, left=1)]
    if results.search is not None:
        parts.append(words.PRIVATE_SEARCH)
        parts += [f"{_NOISE[placement]}:\n\n{_tried(tried)}" for placement, tried in results.search.private.items()]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _tried(tried: Sequence[Tried]) -> str:
    body = [[one.name, f"{100 * one.score:.2f}"] for one in tried[:_SHOWN]]
    return _table([f"candidate (the best {len(body)} of {len(tried)})", "mean of hospitals"], body, left=1)


def _mean(row: Row) -> str:
    return f"{row.mean:.2f} ± {row.deviation:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]], *, left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body)) + "\n"
