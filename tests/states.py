"""What a site remembers of a run, as one round after the other leaves and finds it."""

from fedclaw.site.state import SiteStates, State


def before(states: SiteStates, federation: str, run: str, round: int) -> State:
    """What `round` begins with; empty the first time."""
    remembered = states.find(federation, run)
    return {} if remembered is None else remembered.beginning(round)


def newest(states: SiteStates, federation: str, run: str) -> State:
    """What there is after the last round."""
    remembered = states.find(federation, run)
    return remembered.after if remembered else {}


def keep(states: SiteStates, federation: str, run: str, round: int, state: State) -> None:
    """Remember `state` as what `round`, which was charged and left, made."""
    charge = f"charge of round {round}"
    states.stage(federation, run, round, state, charge, None, before(states, federation, run, round))
    states.commit(federation, run, charge)
