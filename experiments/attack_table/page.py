"""docs/strategies/robust.md, from the results: every measured number in it is one of theirs."""

import textwrap
from collections.abc import Sequence

from experiments.attack_table.results import Entry, Results

_INTRODUCTION = """# Robust strategies: when some sites may be hostile

FedAvg believes everybody: one site that sends enough of the wrong thing decides the model. The strategies of this page
put something else in the mean's place. They look at every update by itself, so they go with no secure aggregation and
with no noise on the sum (a run that asks for both is refused at its start); noise of the sites' own, `privacy=dp`,
goes with all of them.

    python -m fedclaw.server strategy=multi_krum strategy.hostile=2 sites.minimum=7 …

| strategy | in the mean's place | withstands | sites in every round | example weights |
| --- | --- | --- | --- | --- |
| `norm_bounding` | the mean, no update longer than a bound | force, not patience | 3 (1 with `bound`) | ignored |
| `centred_clipping` | the last result plus clipped differences | force, not patience | 3 (1 with `radius`) | ignored |
| `rfa` | the geometric median | less than half of the weight | 3 | **used** |
| `median` | the median of each coordinate | less than half of the sites | 3 | ignored |
| `trimmed_mean` | the mean of each coordinate without its ends | `hostile` sites | 2 hostile + 1 | ignored |
| `krum` | the one update with the most company | `hostile` sites | 2 hostile + 3 | ignored |
| `multi_krum` | the mean of those with the most company | `hostile` sites | 2 hostile + 3 | ignored |
| `bulyan` | Krum's choice, then the middle of each coordinate | `hostile` sites | 4 hostile + 3 | ignored |

A run whose rounds may count with fewer sites than that is refused, with the number to set `sites.minimum` to. Weights
are ignored because nobody can check how many examples a site really has. RFA uses them, as its paper does: where sites
may lie about their number, add `weighting=uniform` or `weighting=capped`. The server holds as many models as sites
answer; FedAvg holds one.

## Which one

- **Nobody is hostile, but something may break** (a wrong export, a site that diverges): `multi_krum` or `trimmed_mean`
  with `hostile: 1`. They cost little when all is well.
- **A few hostile sites, data much alike**: `multi_krum`, `trimmed_mean`, or `bulyan` where there are sites enough.
- **Sites that differ much**: `rfa` or `centred_clipping`. Rules that choose, Krum above all, throw out the honest site
  that is unlike the others, and with it what only that site knows.
- **One site's large, scaled update is the fear** (model replacement): `norm_bounding` takes its force away, and is the
  nearest to FedAvg. Clipping slows several sites down that agree on a direction, and does not stop them.
- **Secure aggregation is not negotiable**: none of these. Cap the weights (`weighting=capped`), keep the run short and
  test the model on data of your own.
"""

_TABLE = """## Measured

Digits, {sites} sites ({partition}), {rounds} rounds of {steps} local steps; accuracy in percent on {share:.0f}% of the
images, which no site has; mean ± standard deviation over {seeds}. Each strategy keeps one setting throughout, made for
three hostile sites where {sites} sites are enough for that: `hostile: 3` for the trimmed mean, Krum and multi-Krum,
`hostile: 1` for Bulyan. The table and this page come from

    python -m experiments.attack_table

with the settings of `conf/attack_table.yaml`; it can be interrupted and goes on. The runs here took {minutes:.0f}
minutes one after the other, with one thread each and beside other work.

![accuracy by strategy and attack]({image})
"""

_ATTACKS = """The attacks (`experiments/attacks`, `conf/attack/`): **label flip** trains on turned labels; **sign flip**
sends ten times the update, turned round; **Gaussian** sends noise thirty times as large as the update; **backdoor**
trains on images with a mark in the corner that are labelled 0, and scales the update until the mean is replaced by it;
**a little is enough** sends the honest mean minus 1.5 deviations in every coordinate; **inner product** sends the
honest mean, halved and turned round. The last two know every honest update of the round, which a real attacker does
not: `knows: hostile` is what one does know, and weaker. The same sites are hostile whatever the attack and the
strategy, and receipts, weights and shapes are those of honest answers.
"""

_READING = """## What to read from it

- Plain averaging ends at {fedavg} under a single sign flip, and one hostile site is enough for a backdoor: {door} of
  the marked images are taken for the class that the attacker chose.
- Accuracy does not show a backdoor. With three hostile sites, these shares of the marked images are taken for that
  class: {doors}.
- What robustness costs when nobody attacks: FedAvg has {clean}, the strategies between {dearest} and {cheapest}.
- The lowest accuracy with three hostile sites, and by what: {worst}.
- Quiet lies go further than loud ones. The attacks that a mean hardly notices, inner product and a little is enough,
  are made for rules about distance: Krum under the inner product of three ends at {krum}, FedAvg at {mean}.

## What nothing here stops

- **More hostile sites than a rule is made for.** Three of ten are beyond Bulyan, which takes 4 · 3 + 3 = 15 sites for
  three; it ran with `hostile: 1`, so what it shows in the columns for three is luck of these attacks and no promise.
  Beyond half, nothing can help: then the hostile sites are the federation.
- **Lies within the spread of honest updates.** The more sites differ, the more room there is between them. Nothing that
  looks at updates alone can tell such a site from an honest one with unusual data.
- **Poisoned data, patiently.** A backdoor that is not scaled (`attack.scale: 1`) hides in ordinary updates; rare inputs
  are learnt from those who have them, whoever they are. Test models for behaviour, not only for accuracy.
- **A hostile server.** It sees every update here. That is what secure aggregation is for, and the two exclude each
  other: decide whom to mistrust.
- **Honest sites that are unlike the others** are treated as hostile ones are. Compare the per-site metrics of a robust
  run with those of FedAvg before it is called safe.
"""


def render(results: Results, image: str) -> str:
    """The page."""
    settings = results.settings
    strategies = list(dict.fromkeys(entry.strategy for entry in results.entries))
    text = _TABLE.format(
        sites=settings.dataset.sites,
        partition=_words(results),
        rounds=settings.rounds,
        steps=settings.training.steps or f"{settings.training.epochs:g} epochs of",
        share=100 * settings.dataset.public,
        seeds=f"{len(results.seeds)} seeds" if len(results.seeds) > 1 else "one seed",
        minutes=max(1, results.seconds / 60),
        image=image,
    )
    parts = [_INTRODUCTION, text]
    for number in settings.hostile:
        site = "one site is" if number == 1 else f"{number} sites are"
        parts.append(f"Accuracy when {site} hostile, in percent:\n\n{_accuracies(results, strategies, number)}\n")
    if doors := _backdoors(results, strategies):
        parts.append(f"The backdoor's success: marked images that are taken for its class, in percent:\n\n{doors}\n")
    return "\n".join([*parts, _ATTACKS, _wrapped(_reading(results, strategies))])


def _words(results: Results) -> str:
    partition = results.settings.partition
    alpha = getattr(partition, "alpha", None)
    return partition.name if alpha is None else f"labels by {partition.name.capitalize()}, alpha {alpha:g}"


def _accuracies(results: Results, strategies: Sequence[str], number: int) -> str:
    names = [name for name, hostile in results.columns if hostile == number]
    head = ["strategy", "nobody", *(name.replace("_", " ") for name in names)]
    rows = [
        [
            f"`{strategy}`",
            _pm(results.find(strategy, "none", 0).accuracy),
            *(_pm(results.find(strategy, name, number).accuracy) for name in names),
        ]
        for strategy in strategies
    ]
    return _markdown(head, rows)


def _backdoors(results: Results, strategies: Sequence[str]) -> str:
    columns = [column for column in results.columns if results.find(strategies[0], *column).backdoor is not None]
    if not columns:
        return ""
    head = ["strategy", *(f"{number} hostile" for _, number in columns)]
    rows = [
        [f"`{strategy}`", *(_pm(results.find(strategy, *column).backdoor or (0.0, 0.0)) for column in columns)]
        for strategy in strategies
    ]
    return _markdown(head, rows)


def _reading(results: Results, strategies: Sequence[str]) -> str:
    """The page's end; only for a table that has what it speaks of."""
    few, many = min(results.settings.hostile), max(results.settings.hostile)
    robust = [name for name in strategies if name != "fedavg"]
    try:
        door = results.find("fedavg", "backdoor", few).backdoor
        costs = sorted(robust, key=lambda name: results.find(name, "none", 0).accuracy)
        return _READING.format(
            fedavg=_percent(results.find("fedavg", "sign_flip", few)),
            door=f"{100 * (door or (0.0, 0.0))[0]:.0f}%",
            doors=", ".join(_success(results, name, many) for name in strategies),
            clean=_percent(results.find("fedavg", "none", 0)),
            dearest=f"{_percent(results.find(costs[0], 'none', 0))} (`{costs[0]}`)",
            cheapest=f"{_percent(results.find(costs[-1], 'none', 0))} (`{costs[-1]}`)",
            worst=", ".join(_worst(results, name, many) for name in strategies),
            krum=_percent(results.find("krum", "inner_product", many)),
            mean=_percent(results.find("fedavg", "inner_product", many)),
        )
    except (KeyError, IndexError):
        return ""


def _wrapped(text: str) -> str:
    """`text`, whose numbers have made its lines longer and shorter, in lines of one width again."""
    blocks: list[str] = []
    for line in text.splitlines():
        if blocks and line.startswith("  "):
            blocks[-1] += " " + line.strip()
        else:
            blocks.append(line)
    wrap = textwrap.TextWrapper(120, break_on_hyphens=False, break_long_words=False)
    lines = []
    for block in blocks:
        wrap.subsequent_indent = "  " if block.startswith("- ") else ""
        lines += wrap.wrap(block) or [""]
    return "\n".join(lines) + "\n"


def _worst(results: Results, strategy: str, number: int) -> str:
    found = [results.find(strategy, name, hostile) for name, hostile in results.columns if hostile == number]
    worst = min(found, key=lambda entry: entry.accuracy)
    return f"`{strategy}` {_percent(worst)} ({worst.attack.replace('_', ' ')})"


def _success(results: Results, strategy: str, number: int) -> str:
    mean, _ = results.find(strategy, "backdoor", number).backdoor or (0.0, 0.0)
    return f"`{strategy}` {100 * mean:.0f}%"


def _percent(entry: Entry) -> str:
    return f"{100 * entry.accuracy[0]:.0f}%"


def _pm(value: tuple[float, float]) -> str:
    return f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
