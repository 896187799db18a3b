"""docs/privacy_table_persons.md, from the results: the same data with rows and with persons as the unit."""

import textwrap
from collections.abc import Iterator, Sequence

from experiments.privacy_table import page
from experiments.privacy_table.cells import CellResult
from experiments.privacy_table.results import Results, Row
from experiments.privacy_table.settings import TaskSettings
from experiments.sources import DatasetSettings
from fedclaw.privacy.claims import Claim
from fedclaw.protocol.terms import DataUnit

_INTRODUCTION = """# Rows or persons: what it costs to protect everybody with all of their rows

[What privacy costs](privacy_table.md) protects rows: what leaves a site tells little of whether any one row is in its
data. Whoever has several rows there is protected less. Here the same federations are trained twice: once with the
**row** as the unit of every guarantee, and once with the **person**, with all of their rows.

The persons are made: the rows of a public data set are grouped at random, {least} to {most} rows a person, each number
as likely, once and for all seeds. A person is dealt to one site as a whole, and is in its training data or in its test
data, never in both. Rows, persons, sites and test data are the same for both units; for rows, the column that tells
whose they are is left out. Real persons differ from these: the rows of one resemble each other, which makes a person
easier to find, and those rows worth less to a model.

Accuracy is that on all sites' test rows together, of persons in nobody's training data, each row counting once, as mean
± standard deviation over {seeds}. All epsilons are at delta {delta:g}. What they promise:

- {example}
- {person}
- Each site makes its promise by itself: for a person at two sites their epsilons would add up.

This page is made, number by number, by

    python -m experiments.privacy_table persons

with the settings of `conf/privacy_table_persons.yaml`, as the other page is made: by the server's own loop and the
sites' own code, policies, ledgers, secure aggregation and all. The times of its runs and audits, each with one thread
and beside other work on the same machine, add up to {minutes:.0f} minutes. The runs of the other page are older, with
another model and another deal: what is to be compared is on this page.

![accuracy against epsilon, by row and by person]({image})
"""

_COLUMNS = """- **Unit**: what is hidden. The two halves of a table are two different promises, not two ways to one.
{columns}\
  The attack is on the unit: its canaries are rows, or persons with several rows. Its bound is for noise of the kind
  that the accountant assumes, however much of it there is; without noise, for any mechanism.
"""

_REFUTED = """## What a row's epsilon says of a person

It does not cover one. These are runs with the row as the unit, attacked once more: by persons of {rows} rows each, all
alike, who are in the data with all of their rows or not at all (`python -m fedclaw.audit … rows_together={rows}`).

| data | noise | epsilon of a row, accountant | found by rows | found by persons of {rows} rows |
| --- | --- | ---: | ---: | ---: |
{lines}

{reading}
That is no fault of the mechanism. The claim is for a row, and for {rows} rows of one person epsilon is up to {rows}
times as large, at a delta that is no longer small. A guarantee for persons has to be asked for, by naming the column
that says whose a row is (`person:` in the schema). The bound of persons is one for any mechanism, and can be no larger
than the number of guesses allows, whatever leaks: {canaries} persons, of whom the surest are guessed.
"""

_READING = """## What to read from it

**What a person costs.** The noise is made for one unit, and is the same at the same epsilon, rate and number of steps:
`clip` times the multiplier. What changes is the sum that it hides in. By row, each of about {train} training rows adds
up to `clip` to it; by person, each of {persons} persons adds up to `clip`, with all of their rows together. So at equal
rates and steps the noise is about {ratio:.0f} times as large beside the sum, as a person has {rows} rows on average.
What makes up for it is more persons, a larger epsilon, or a model with fewer parameters, over which there is less
noise. A little comes back: the sum of a person's gradients points the right way more often than one row's.

**Many rows give no larger say.** By row, a person with {most} rows moves the model up to {most} times as far as one
with a single row. By person, both move it by `clip` at most: the gradients of all rows of a person are summed, then
clipped together. That is part of the price, where those with many rows have the most to tell.

The price in percentage points of accuracy: by row less by person, at the same epsilon.

| data | noise | epsilon | by row | by person | a person costs |
| --- | --- | ---: | ---: | ---: | ---: |
{prices}

Each price is the mean over {seeds} and its standard error, worked out seed by seed, since both units share deals and
initial models. What is not well above its standard error is not told apart from chance.

**Without noise** the units differ in nothing but the batches, of rows or of whole persons.

**Limits.** {limits}

## Settings
"""

_LIMITS = """The settings of each placement and unit were chosen by a small grid
(`python -m experiments.privacy_table persons search`), at epsilon {searched:g}, on a deal with seed 0, which is not
among the seeds of the table. The model was chosen there too, among three sizes, for the unit person. Some test rows of
that deal are test rows of another seed, so all accuracies may be a little too high, for both units alike. What the
search would cost in privacy on real data is not counted. {persons} persons are few: with {ratio:.0f} times as many, the
noise by person would be as large beside the sum as it is by row here.
{audits}"""

_UNITS: dict[DataUnit, str] = {"example": "a row", "person": "a person"}


def render(results: Results, image: str) -> str:
    """The page as Markdown; `image` is the plot's file name beside it. There is a task for either unit of each set."""
    parts = [_introduction(results, image)]
    parts += [_data_set(results, names) for names in _pairs(results)]
    parts.append(_COLUMNS.format(columns=page.columns(results)))
    parts += [_refuted(results)] if any(row.by_person for row in results.rows) else []
    parts.append(_reading(results))
    for names in _pairs(results):
        parts += [_settings(results.settings.tasks[name]) for name in names]
    return "\n".join(parts).rstrip() + "\n"


def _pairs(results: Results) -> Iterator[tuple[str, str]]:
    """Of each data set, the task by row and the task by person."""
    for names in results.settings.data_sets.values():
        by_unit = {results.settings.tasks[name].unit: name for name in names}
        if len(by_unit) > 1:
            yield by_unit["example"], by_unit["person"]


def _introduction(results: Results, image: str) -> str:
    settings = results.settings
    persons = _first_data(results).persons
    assert persons is not None
    return _INTRODUCTION.format(
        least=persons.least,
        most=persons.most,
        seeds=page.seeds(results),
        delta=settings.delta,
        example=_wrapped(Claim("example").protects),
        person=_wrapped(Claim("person").protects),
        minutes=results.seconds / 60,
        image=image,
    )


def _wrapped(sentence: str) -> str:
    """As an item of a list."""
    return textwrap.fill(sentence, 118, subsequent_indent="  ")


def _first_data(results: Results) -> DatasetSettings:
    first, _ = next(_pairs(results))
    return results.settings.tasks[first].dataset


def _data_set(results: Results, names: Sequence[str]) -> str:
    task = results.settings.tasks[names[0]]
    rows, persons = _sizes(results, names)
    lines = [
        f"## {page.title(task.dataset.name)}",
        "",
        f"About {rows.train_examples} training rows of {persons.train_units} persons, and {rows.test_examples} test "
        f"rows of others, over {task.dataset.sites} sites; model `{task.workload.model.name}`.",
        "",
        "| unit | noise | epsilon asked | accuracy | epsilon, accountant | epsilon, audit |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        unit = _UNITS[results.settings.tasks[name].unit]
        mine = [row for row in results.rows if row.task == name]
        lines += [f"| {' | '.join((unit, page.NOISE[row.placement], *page.figures(row)))} |" for row in mine]
    return "\n".join(lines) + "\n"


def _sizes(results: Results, names: Sequence[str]) -> tuple[CellResult, CellResult]:
    """A cell by row and one by person, for how many there are."""
    by_row, by_person = (next(row for row in results.rows if row.task == name).cells[0] for name in names)
    return by_row, by_person


def _refuted(results: Results) -> str:
    rows = [row for row in results.rows if row.by_person is not None]
    attacked, audit = results.settings.by_persons, results.settings.audit
    assert attacked is not None
    assert audit is not None
    lines, above = [], 0
    for row in rows:
        assert row.by_person is not None
        assert row.accounted is not None
        above += row.by_person.epsilon_lower > row.accounted
        found = "not run" if row.audit is None else f"≥ {row.audit.epsilon_lower:.2f}"
        by_person = f"≥ {row.by_person.epsilon_lower:.2f}"
        shown = f"**{by_person}**" if row.by_person.epsilon_lower > row.accounted else by_person
        name = page.title(results.settings.tasks[row.task].dataset.name)
        lines.append(f"| {name} | {page.NOISE[row.placement]} | {row.accounted:.3f} | {found} | {shown} |")
    below = "The persons' bounds lie below the epsilon of a row here: this attack did not show what arithmetic says."
    reading = (
        f"In {above} of {len(rows)} lines the persons' bound (in bold) lies above the epsilon of a row."
        if above
        else below
    )
    return _REFUTED.format(rows=attacked.rows, canaries=audit.canaries, lines="\n".join(lines), reading=reading)


def _reading(results: Results) -> str:
    names = next(_pairs(results))
    rows, persons = _sizes(results, names)
    grouped = _first_data(results).persons
    ratio = rows.train_examples / (persons.train_units or rows.train_examples)
    return _READING.format(
        train=rows.train_examples,
        persons=persons.train_units,
        ratio=ratio,
        rows=f"{ratio:.1f}",
        most=grouped.most if grouped else 1,
        prices="\n".join(_prices(results)),
        seeds=page.seeds(results),
        limits=_limits(results, persons.train_units, ratio),
    )


def _limits(results: Results, persons: int | None, ratio: float) -> str:
    missing = sum(row.audit is None for row in results.rows)
    words = f"{missing} of {len(results.rows)} lines were not audited, for want of time."
    audits = words if missing and results.settings.audit else ""
    searched = results.settings.search_epsilon
    return _LIMITS.format(searched=searched, persons=persons, ratio=ratio, audits=audits).rstrip()


def _prices(results: Results) -> Iterator[str]:
    for by_row, by_person in _pairs(results):
        for row in (row for row in results.rows if row.task == by_row):
            other = results.find(by_person, row.placement, row.epsilon)
            if other is not None:
                name = page.title(results.settings.tasks[by_row].dataset.name)
                yield f"| {name} | {page.NOISE[row.placement]} | {' | '.join(_price(row, other))} |"


def _price(row: Row, other: Row) -> tuple[str, ...]:
    asked = "none" if row.epsilon is None else f"{row.epsilon:g}"
    return asked, f"{100 * row.mean:.1f} %", f"{100 * other.mean:.1f} %", page.price(row, other)


def _settings(task: TaskSettings) -> str:
    unit: dict[DataUnit, str] = {"example": "by row", "person": "by person"}
    return page.settings_table(f"{page.title(task.dataset.name)}, {unit[task.unit]}", task)
