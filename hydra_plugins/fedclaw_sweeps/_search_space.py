"""Hydra's sweep overrides as Optuna's distributions.

a=x,y,z  choice(x,y)       one of these
range(1,10,step=3)         1, 4 or 7
interval(0.1,10)           a number in between; int(interval(1,9)) a whole one
tag(log,interval(1e-4,1))  the same, on a logarithmic scale
"""

from collections.abc import Iterable

from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import CompactHydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

_LOG = "log"


def split(overrides: Iterable[Override]) -> tuple[dict[str, BaseDistribution], list[str]]:
    """What is searched, by key, and the overrides that stay as they are. Raises CompactHydraException."""
    space: dict[str, BaseDistribution] = {}
    fixed: list[str] = []
    for override in overrides:
        if override.is_sweep_override():
            space[override.get_key_element()] = _distribution(override)
        else:
            fixed.append(str(override.input_line))
    return space, fixed


def _distribution(override: Override) -> BaseDistribution:
    value = override.value()
    if isinstance(value, IntervalSweep):
        return _between(value, str(override.input_line))
    # As text, in Hydra's own grammar: what is chosen becomes an override again.
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def _between(interval: IntervalSweep, written: str) -> BaseDistribution:
    low, high, log = interval.start, interval.end, _LOG in interval.tags
    if low is None or high is None or not low < high or (log and low <= 0):
        raise CompactHydraException(f"{written}: an interval goes from a lower to a higher end, with tag(log) above 0")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)
