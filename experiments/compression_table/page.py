"""docs/update_compression.md, from the results: every number in its table is one of theirs."""

from experiments.compression_table.results import LAST, Row
from experiments.compression_table.settings import TableSettings

_INTRODUCTION = """# Update compression

What a site sends, an update of four bytes a parameter, can travel in fewer: `compression=` of `fedclaw.server`,
`experiments.run` and the others.

    python -m fedclaw.server ... compression=int8
    python -m fedclaw.server ... compression=topk compression.fraction=0.02
    python -m experiments.run compression=randk secure=secagg secure.largest_weight=1000 privacy=none

| `compression` | a number takes | what it does | source |
| --- | --- | --- | --- |
| `fp16` | 2 bytes | rounds to half precision, under a power of two for each tensor | |
| `int8`, `int4` | 1 byte, 1/2 byte | rounds at random to 127 or 7 steps of the largest in its block, without bias | \
QSGD: Alistarh et al. 2017, section 3.1 |
| `topk` | 4 bytes and a position (at most 4), for `fraction` of them | sends the largest; the rest waits at the site \
| Stich, Cordonnier, Jaggi 2018; Karimireddy et al. 2019, algorithm 1 |
| `randk` | 4 bytes, for `fraction` of them | sends those at random positions, the same at every site, times 1 / \
`fraction` | Stich, Cordonnier, Jaggi 2018 |
| `powersgd` | `rank` (n + m) x 4 bytes for n x m of them | sends two factors; what they miss waits | Vogels, \
Karimireddy, Jaggi 2019, algorithm 1 |

"Waits" is error feedback (`compression.feedback`; off for `randk`, which is right in the mean without it): what was not
sent is added to the site's next update. It is the site's own state: it never leaves, survives a restart, and a round
that is asked again begins with what it began with the first time. It is left behind when the terms of the run change.
"""

_WHICH = """## When to use which

- **`int8` first.** A quarter of the bytes, unbiased, no memory at the sites, nothing to choose. `int4` halves that
  again, with more noise, which in neither task could be told from chance.
- **`fp16`** where nothing at all may change and half is enough.
- **`topk` with feedback** where the uplink is what a round waits for: the fewest bytes to an accuracy, but it wants
  rounds, for what waits is sent late. Without feedback it can stop anywhere: the dashed lines, and a counter-example in
  `tests/learning/test_error_feedback.py`. Sites that take part seldom carry what waits for long.
- **`powersgd`** for models of large matrices, whose factors are far smaller; small convolutions and vectors hardly
  shrink. It costs a site a QR decomposition a matrix.
- **`randk`** under secure aggregation or noise on the sum, where nothing else goes. Otherwise `topk` is better at the
  same bytes: it chooses. With feedback `randk` was slower in both tasks: a number waits 1 / `fraction` rounds on
  average, and arrives as it was.

## What goes with what

| | `fp16`, `int8`, `int4`, `topk`, `powersgd` | `randk` |
| --- | --- | --- |
| noise at the sites (`privacy=dp`) | yes: what leaves, and what waits, is made of the noised update; it costs nothing \
more | yes |
| secure aggregation | refused: a masked number has four bytes whatever it was, scales, positions and factors do not \
add up, and positions chosen by size tell about the data | yes: the vector is shorter, and all sites leave out the \
same |
| noise on the sum (`central=`) | refused: what comes after the clipping may enlarge an update beyond the bound that \
the noise was made for (stochastic rounding does) | yes: the numbers that are sent are clipped, and noise is added to \
those alone. Not with `compression.feedback=true`: what waited is not within this round's bound |
| strategies that see every update (Krum, median, ...) | yes, but `topk` is refused: each site sends other numbers, \
and what is compared would mostly be zeros | yes |
| asynchronous (FedBuff) | yes | refused: answers of several rounds are added, and each has its own positions |
| what a strategy adds (SCAFFOLD's control variates, normalisers) | travels as it is | travels as it is |

The sites' parameters go out as they are: only what comes back is compressed. `metrics.jsonl` has, for each round,
`bytes_up` and `bytes_down`: the bytes of the arrays in the answers that counted, and of those that their sites trained
from (the evaluation, which sends the parameters once more, is not in it).

The server opens an answer when it arrives and holds it to what the plan says: names, types, shapes, and that positions
ascend and lie inside, that scales are finite and no code is out of range. One that does not fit is declined as a whole,
and opening one takes the memory of one model whatever was sent.
"""


def render(rows: list[Row], settings: TableSettings, image: str) -> str:
    """The page."""
    parts = [_INTRODUCTION, _measured(settings, image)]
    parts += [_table(task, [row for row in rows if row.task == task], settings) for task in settings.tasks]
    return "\n".join([*parts, _WHICH])


def _measured(settings: TableSettings, image: str) -> str:
    return f"""## Measured

Four sites, FedAvg, no privacy; {settings.seeds} seeds of the deal and of the initial model, mean ± standard deviation
of the accuracy over the last {LAST} rounds, by federated evaluation. **Sent**: bytes of one site's answer. **To the
target**: what each site had sent when the accuracy was first there; never: some seed was not there after all rounds.

    python -m experiments.compression_table

makes this page, number by number, with the server's loop and the sites' code in process; every setting is in
`conf/compression_table.yaml`.

![accuracy against bytes]({image})

Lines are means over the seeds, round by round; dashed ones are without error feedback.
"""


def _table(task: str, rows: list[Row], settings: TableSettings) -> str:
    described = settings.tasks[task]
    lines = [
        f"### {task.replace('_', ' ')}: {described.rounds} rounds, target {described.target:.0%}\n",
        "| | sent, bytes | of as it is | accuracy, % | to the target, kB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        reached = "never" if row.to_target is None else f"{1e3 * row.to_target:.0f}"
        lines.append(
            f"| {row.method} | {row.update:,.0f} | {row.share:.1%} | {100 * row.mean:.1f} ± {100 * row.deviation:.1f} "
            f"| {reached} |"
        )
    return "\n".join([*lines, ""])
