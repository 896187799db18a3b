"""docs/survival_curves.md, from the results: every number in it is one of theirs."""

from collections.abc import Sequence

from experiments.markdown import filled
from experiments.survival_curves.cells import Spread, StudyResult, distance
from experiments.survival_curves.results import Results, Row
from fedclaw.privacy.survival_estimates import SMALLEST_P, LogRank

_NOISE = {"own": "each site's own", "shares": "all sites', in shares"}
_YEAR = 365.25

_INTRODUCTION = """# Survival curves over real sites

What [survival curves over sites](survival.md) come to on real patients: Kaplan-Meier curves and the log-rank test of
all rows pooled, of each site by itself, of the federation without noise, and with differential privacy.

    python -m experiments.survival_curves data=DIRECTORY

makes this page with the sites' own code, real policies and real ledgers, in one process. The data is not shipped.
TCGA-BRCA (Liu and others 2018, https://doi.org/10.1016/j.cell.2018.02.052; its clinical part, as FLamby prepares it,
https://arxiv.org/abs/2210.04620) comes from six regions, so it is a federation by nature. GBSG2 (German Breast Cancer
Study Group 2, Schumacher and others 1994) is a trial that lifelines and scikit-survival ship; its rows are dealt at
random. Settings are in `conf/survival_curves.yaml`. Every curve here, the pooled ones too, ends where fewer than
{smallest:g} are at risk.

![curves of each site, of all together, and through the noise]({image})
"""

_READING = """## How to read the tables with noise

- **noise a cell**: standard deviation of the noise in each cell of the sum. **reaches**: where curves end, in the mean
over groups and draws, because the noised number at risk is no longer told from 0 or is below {smallest:g}.
- **largest distance**: from the pooled curve, over groups and the bins that are reached, over {draws} draws of the
noise with the same rows: the median, and the tenth and ninetieth percentile. **one release**: what the real sites' one
release came to.
- **coverage**: how often a 95% band holds the truth, over {draws} draws, groups, and the bins that a curve reaches. The
truth is the pooled curve: each draw takes as many rows of each group as there are, by the shares of the pooled
cells, and fresh noise.
- **p**: the log-rank p-value, noise included, over the draws of the noise with the same rows. It is never below {p:g}.
- **epsilon, ledger**: the most that a site's ledger holds for its release, at delta {delta:g}.
"""

_SAYS = """## What it says

Without noise the federation loses nothing: the sites' cells add up to the pooled ones, exactly, which the experiment
checks before it goes on. In the open every site adds all the noise that it needs, so that K sites have sqrt(K) times
the noise of one; in shares the sum has little more than one site's (one of the sites may tell the server its noise),
however many they are. The noise of a cell does not grow with the rows: with ten times the rows, curves through the
noise would be as near as at ten times the epsilon, about.

What noise hides first is a difference between groups: a log-rank statistic is made of the events of all bins, each with
its noise. The p-value counts that, so it is larger than without noise, and smaller only by chance. One release is one
draw; another would differ as the percentiles say.
"""


def render(results: Results, image: str) -> str:
    """The page as Markdown; `image` is the picture's file name beside it."""
    settings = results.settings
    parts = [_INTRODUCTION.format(image=image, smallest=settings.smallest)]
    for name, study in results.studies.items():
        parts += [_without_noise(study), _with_noise(results.of(name), study)]
    told = {"smallest": settings.smallest, "draws": settings.draws, "p": SMALLEST_P, "delta": settings.delta}
    return filled([*parts, _READING.format(**told), _SAYS])


def _without_noise(study: StudyResult) -> str:
    first = f"""## {study.title}

{sum(study.rows.values())} rows, {sum(study.events.values())} of them with the event ({study.event}), in
{len(study.ends)} bins of {study.ends[0]:g} days; by {study.group}: {" or ".join(study.groups)}. Federated without noise
equals pooled, cell by cell: a largest distance of 0. Binning moves the pooled curves by at most {study.binning:.4f}.
Log-rank test without noise:
{_p(study.log_rank)}, statistic {study.log_rank.statistic:.2f}.
"""
    body = []
    for name, curve in study.by_site.items():
        apart = distance(curve.survival, study.everybody.survival)
        reaches = len(curve.survival) * study.ends[0] / _YEAR
        body.append([name, str(study.rows[name]), str(study.events[name]), f"{reaches:.1f}", f"{apart:.3f}"])
    head = ["site by itself", "rows", "events", "reaches, years", "largest distance from the pooled curve"]
    return f"{first}\n{_table(head, body)}"


def _with_noise(rows: Sequence[Row], study: StudyResult) -> str:
    head = [
        "whose noise",
        "epsilon",
        "noise a cell",
        "reaches, years",
        "largest distance",
        "one release",
        "coverage",
        "p",
        "p, one release",
        "epsilon, ledger",
    ]
    body = []
    for row in rows:
        found = row.result
        reaches = found.reached * study.ends[0] / _YEAR
        body.append(
            [
                _NOISE[row.cell.placement],
                f"{row.cell.epsilon:g}",
                f"{found.deviation:.2f}",
                f"{reaches:.1f}",
                _spread(found.distance),
                f"{found.released_distance:.3f}",
                "no curve" if found.coverage is None else f"{found.coverage:.3f}",
                "too few at risk" if found.p_value is None else _spread(found.p_value),
                "too few at risk" if found.released_log_rank is None else _p(found.released_log_rank, short=True),
                f"{found.epsilon:.3f}",
            ]
        )
    return _table(head, body)


def _p(found: LogRank, *, short: bool = False) -> str:
    value = f"{found.p_value:.3g}"
    return value if short else f"p = {value}"


def _spread(spread: Spread) -> str:
    return f"{spread.median:.3f} ({spread.low:.3f} to {spread.high:.3f})"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *body)]
    return "\n".join(lines) + "\n"
