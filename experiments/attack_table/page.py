"""docs/strategies/robust.md, from the results: every number in it is one of theirs."""

from experiments.attack_table.results import Results


def render(results: Results, image: str) -> str:
    """The page."""
    return ""
