"""What a site remembers from round to round."""

import numpy as np
import pytest

from fedclaw.errors import CheckpointError
from fedclaw.site.state import SiteStates
from tests.states import before, keep, newest


def state(value: float) -> dict[str, dict[str, np.ndarray]]:
    return {"control": {"head.weight": np.full((2, 2), value, np.float32)}}


@pytest.fixture(params=["memory", "files"])
def states(request, tmp_path):
    return SiteStates(tmp_path / "strategy" if request.param == "files" else None)


def value_of(found) -> float:
    return float(found["control"]["head.weight"][0, 0])


def test_a_round_begins_with_what_the_one_before_it_left(states):
    assert before(states, "clinic", "run", 1) == {}
    keep(states, "clinic", "run", 1, state(1.0))
    assert value_of(before(states, "clinic", "run", 2)) == 1
    assert value_of(before(states, "clinic", "run", 5)) == 1, "rounds without the site"
    assert before(states, "clinic", "other", 2) == {}
    assert before(states, "bank", "run", 2) == {}


def test_a_round_that_is_asked_again_begins_where_it_began(states):
    keep(states, "clinic", "run", 1, state(1.0))
    keep(states, "clinic", "run", 2, state(2.0))
    assert value_of(before(states, "clinic", "run", 2)) == 1
    keep(states, "clinic", "run", 2, state(7.0))
    assert value_of(before(states, "clinic", "run", 2)) == 1
    assert value_of(before(states, "clinic", "run", 3)) == 7
    assert value_of(newest(states, "clinic", "run")) == 7


def test_a_new_run_of_an_old_name_begins_with_nothing(states):
    keep(states, "clinic", "run", 1, state(1.0))
    keep(states, "clinic", "run", 2, state(2.0))
    assert before(states, "clinic", "run", 1) == {}
    keep(states, "clinic", "run", 1, state(5.0))
    assert value_of(before(states, "clinic", "run", 2)) == 5


def test_a_kind_that_a_round_does_not_touch_stays(states):
    keep(states, "clinic", "run", 1, state(1.0))
    keep(states, "clinic", "run", 2, {"personal": {"bias": np.zeros(3, np.float32)}})
    assert value_of(newest(states, "clinic", "run")) == 1
    assert newest(states, "clinic", "run")["personal"]["bias"].shape == (3,)


def test_files_survive_a_restart_and_are_the_sites_alone(tmp_path):
    keep(SiteStates(tmp_path / "strategy"), "clinic", "../../run", 1, state(4.0))
    (path,) = (tmp_path / "strategy").iterdir()
    assert path.stat().st_mode & 0o077 == 0
    assert (tmp_path / "strategy").stat().st_mode & 0o077 == 0
    assert value_of(before(SiteStates(tmp_path / "strategy"), "clinic", "../../run", 2)) == 4
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="damaged"):
        newest(SiteStates(tmp_path / "strategy"), "clinic", "../../run")
