"""docs/privacy_table.md, from the results: every number in it is one of theirs."""

import statistics
from collections.abc import Sequence

from experiments.datasets import site_names
from experiments.privacy_table.results import Results, Row
from experiments.privacy_table.settings import Placement, PlacementSettings, TaskSettings
from fedclaw.protocol.terms import DataUnit, RoundRules
from fedclaw.server.exchange import Seats

NOISE: dict[Placement, str] = {
    "none": "none",
    "local": "each site's own",
    "central": "the server's, on the sum",
    "distributed": "all sites', in shares",
    "site": "the server's, on the sum; unit: a whole site",
}
_TRUSTED: dict[Placement, str] = {
    "none": "everybody who sees an update or the model",
    "local": "nobody",
    "central": "the server",
    "distributed": "enough of the other sites",
    "site": "the server",
}

_INTRODUCTION = """# What privacy costs, and whom it trusts

The same federations, trained without privacy and with epsilon {epsilons}, by who adds the noise. Four sites each;
accuracy on the test examples of all sites together, each counting once, as mean ± standard deviation over {seeds}. All
epsilons are at delta {delta:g}, and for single examples where the table does not say otherwise.

This page is made, number by number, by

    python -m experiments.privacy_table

which runs the server's own loop and the sites' own code in process: policies, ledgers, secure aggregation and all.
Every setting is in `conf/privacy_table.yaml`. It can be interrupted and goes on. The times of this page's runs and
audits, each with one thread and beside other work on the same machine, add up to {minutes:.0f} minutes.

![accuracy against epsilon]({image})
"""

_TRUSTS = """- **Trusts**: who has to be honest for the guarantee to hold towards everybody else.
"""

_COLUMNS = """\
- **Accountant**: the largest epsilon in any site's ledger after any of the runs, from the receipts: what the guarantee
  really is (for whole sites: that of the noise on the sum). It stays a little below what was asked for, as noise is
  calibrated from the safe side.
- **Audit**: a lower bound on epsilon, from attacks on the line's configuration (`python -m fedclaw.audit`),
  {audit}
  A bound above the accountant's epsilon would prove a fault. One below proves nothing: it says how much of the
  guarantee these attacks could use up, and a small number means that they saw little, not that epsilon is that small.
"""

_READING = """## What to read from it

**Central against distributed noise.** Both train alike: each round is one step of DP-SGD on the pooled data. What
distributed noise costs at equal epsilon is its care: a site cannot count on all the others, so each adds so much that
the shares of {honest} of the {sites} sites are enough ({tolerated} may drop out, {corrupt} may tell the server its
noise). When all {sites} are there, the sum has sqrt({sites}/{honest}) = {excess:.2f} times the noise that epsilon asks
for. What is gained is that nobody, the server included, ever sees a sum with less noise than epsilon asks for.
Rounding to integers adds next to nothing (a thousandth of the noise at most).

**Local noise.** A site that trusts nobody has to hide each of its examples in its own update, behind its own noise. The
sum over {sites} sites has the noise {sites} times over, so at the same sampling rate and number of steps its
deviation is sqrt({sites}) = {local:.0f} times that of one noise for all; and a site with few examples samples a larger
share of them for a batch of the same size, which costs more noise again. What is gained is that nobody has to be
trusted, and that a site may take several steps in a round, so fewer rounds do.

The price in percentage points of accuracy, against the server's noise at the same epsilon:

{prices}

Each is the mean over {seeds} and its standard error, worked out seed by seed, since all rows share the deals and the
initial models. What is not well above its standard error is not told apart from chance.

{site}\
**Persons with several rows.** All of the above is for single examples. Somebody with several rows is protected
less: for k rows epsilon is up to k times as large. Where a schema says whose a row is (`person:`), the unit is the
person: persons are sampled, and the gradients of all rows of one are summed and clipped together. It costs accuracy,
since the same noise hides one of fewer units, and a person with twenty rows may move the model no further than one
with a single row. How much, [rows or persons](privacy_table_persons.md) measures on one of these data sets.

**Limits.** The settings of each placement were chosen once for each data set: by a small grid
(`python -m experiments.privacy_table search`, the grids are in the configuration), at epsilon {searched:g}, on a deal
with seed 0, which is not among the seeds of the table, and by the accuracy on the examples that deal held back. The
seeds deal out the same public data sets anew, so some of those examples are test examples of another seed: all
accuracies may be a little too high, for all placements alike. Settings that would suit epsilon 1 or 8 better were
not looked for, and what the search itself would cost in privacy on real data is not counted. Both data sets are
small, and privacy is easier with more examples: the noise is the same, the sum it hides in is larger.

## Settings
"""

_SITE = """**Whole sites as the unit** (not in the plot). Hiding a whole site takes noise on the scale of a whole
update: with {sites} sites, {share:.0%} of the largest mean that they could agree on, times the multiplier that epsilon
asks for, in every coordinate. The rows show what that does; no settings were looked for. The promise is
much stronger than that of the other rows, and made for hundreds of sites.

"""


def render(results: Results, image: str) -> str:
    """The page as Markdown; `image` is the plot's file name beside it."""
    tasks = results.settings.tasks
    parts = [_introduction(results, image)]
    for name, task in tasks.items():
        parts.append(_task(results, name, task))
    parts += [_TRUSTS + columns(results), _reading(results)]
    parts += [settings_table(title(name), task) for name, task in tasks.items()]
    return "\n".join(parts).rstrip() + "\n"


def _introduction(results: Results, image: str) -> str:
    settings = results.settings
    return _INTRODUCTION.format(
        epsilons=_listed([f"{epsilon:g}" for epsilon in settings.epsilons]),
        seeds=seeds(results),
        delta=settings.delta,
        minutes=results.seconds / 60,
        image=image,
    )


def _task(results: Results, name: str, task: TaskSettings) -> str:
    mine = [row for row in results.rows if row.task == name]
    first = mine[0].cells[0]
    lines = [
        f"## {title(name)}",
        "",
        f"About {first.train_examples} training and {first.test_examples} test examples over "
        f"{task.dataset.sites} sites; model `{task.workload.model.name}`.",
        "",
        "| noise | trusts | epsilon asked | accuracy | epsilon, accountant | epsilon, audit |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*lines, *(_row(row) for row in mine)]) + "\n"


def _row(row: Row) -> str:
    return f"| {' | '.join((NOISE[row.placement], _TRUSTED[row.placement], *figures(row)))} |"


def figures(row: Row) -> tuple[str, str, str, str]:
    """What was asked for, the accuracy, the accountant's epsilon and the audit's."""
    asked = "none" if row.epsilon is None else f"{row.epsilon:g}"
    accounted = "unbounded" if row.accounted is None else f"{row.accounted:.3f}"
    accuracy = f"{100 * row.mean:.1f} ± {100 * row.deviation:.1f} %"
    return asked, accuracy, accounted, _audit(row)


def _audit(row: Row) -> str:
    if row.audit is None:
        return "not run"
    return f"≥ {row.audit.epsilon_lower:.2f}" + (" **refuted**" if row.audit.flagged else "")


def columns(results: Results) -> str:
    """What the columns of the tables mean."""
    options = results.settings.audit
    if options is None:
        return _COLUMNS.format(audit="which were not run.")
    words = f"at the first seed's sites, with {options.confidence:.0%} confidence."
    if options.attacked_rounds is not None:
        words += (
            f" The attacked runs have at most {options.attacked_rounds} rounds, with the noise that keeps\n"
            "  so many within the same epsilon."
        )
    return _COLUMNS.format(audit=words)


def _reading(results: Results) -> str:
    settings = results.settings
    sites = max(task.dataset.sites for task in settings.tasks.values())
    seats = Seats.of(site_names(sites), settings.secure, RoundRules().minimum)
    honest = sites - seats.tolerated - seats.corrupt
    shown = any(row.placement == "site" for row in results.rows)
    return _READING.format(
        sites=sites,
        tolerated=seats.tolerated,
        corrupt=seats.corrupt,
        honest=honest,
        excess=(sites / honest) ** 0.5,
        local=sites**0.5,
        prices=_prices(results),
        seeds=seeds(results),
        site=_SITE.format(sites=sites, share=1 / sites) if shown else "",
        searched=settings.search_epsilon,
    )


def _prices(results: Results) -> str:
    lines = ["| data | epsilon | distributed costs | local costs |", "| --- | ---: | ---: | ---: |"]
    for name in results.settings.tasks:
        for epsilon in results.settings.epsilons:
            central = results.find(name, "central", epsilon)
            if central is None:
                continue
            others = [results.find(name, placement, epsilon) for placement in ("distributed", "local")]
            costs = ["-" if other is None else price(central, other) for other in others]
            lines.append(f"| {title(name)} | {epsilon:g} | {' | '.join(costs)} |")
    return "\n".join(lines)


def price(central: Row, other: Row) -> str:
    """Mean and standard error of the differences, seed by seed: both rows have the same deals and initial models."""
    pairs = zip(central.cells, other.cells, strict=True)
    differences = [100 * (first.accuracy - second.accuracy) for first, second in pairs]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} ± {statistics.stdev(differences) / len(differences) ** 0.5:.1f}"


def settings_table(heading: str, task: TaskSettings) -> str:
    """How each placement was trained."""
    lines = [
        f"{heading}:",
        "",
        "| noise | rounds | in a round | learning rate | clip |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for placement, chosen in task.placements.items():
        clip = "-" if placement == "none" else f"{chosen.clip:g}"
        rate = f"{chosen.training.learning_rate:g}"
        lines.append(
            f"| {NOISE[placement]} | {chosen.rounds} | {_local_work(placement, chosen, task.unit)} | {rate} | {clip} |"
        )
    return "\n".join(lines) + "\n"


def _local_work(placement: Placement, chosen: PlacementSettings, unit: DataUnit) -> str:
    if placement in ("central", "distributed"):
        return f"one step, each {unit} with probability {chosen.sample_rate:g}"
    training = chosen.training
    number, word = (training.epochs, "epoch") if training.epochs is not None else (training.steps, "step")
    of = " persons" if unit == "person" else ""
    return f"{number:g} {word}{'' if number == 1 else 's'}, batches of {training.batch_size}{of}"


def title(name: str) -> str:
    """A task's or a data set's name as a heading."""
    return name.replace("_", " ").capitalize()


def seeds(results: Results) -> str:
    """How many, in words."""
    count = results.settings.seeds
    return "one seed" if count == 1 else f"{count} seeds"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
