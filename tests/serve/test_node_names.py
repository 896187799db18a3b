"""Nodes that share a database: each has a name of its own."""

import pytest

from fedclaw.errors import UsageError
from fedclaw.serve.command import claim_name
from fedclaw.serve.home import NodeHome
from fedclaw.serve.state.store import StateStore


def test_two_nodes_of_one_name_are_not_let_run_on_one_database(tmp_path):
    one, other = NodeHome.make(tmp_path / "one").identity(), NodeHome.make(tmp_path / "other").identity()
    assert one == NodeHome(tmp_path / "one").identity() != other
    assert (tmp_path / "one" / "identity").stat().st_mode & 0o777 == 0o600
    with StateStore.open(f"sqlite:///{tmp_path / 'state.db'}") as store:
        claim_name(store, "a", one)
        store.beat("a", "worker-1", [])
        claim_name(store, "a", one)  # Started again, at once.
        claim_name(store, "b", other)
        with pytest.raises(UsageError, match="name=a: another node of this name"):
            claim_name(store, "a", other)


def test_a_name_whose_node_is_gone_can_be_taken_over(tmp_path):
    with StateStore.open(f"sqlite:///{tmp_path / 'state.db'}") as store:
        claim_name(store, "a", "gone")
        claim_name(store, "a", "new")
        store.beat("a", "worker-1", [])
        with pytest.raises(UsageError):
            claim_name(store, "a", "gone")
