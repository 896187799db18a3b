"""What a node does before its processes start."""

import pytest

from fedclaw.errors import UsageError
from fedclaw.export.source import load_source
from fedclaw.protocol.terms import ModelSpec
from fedclaw.serve import releases
from fedclaw.serve.command import take_in
from fedclaw.serve.home import NodeHome
from fedclaw.serve.routing import controller
from fedclaw.serve.routing.plan import BreakerPolicy, read_plan
from fedclaw.serve.settings import NodeSettings, TlsSettings, TokenSettings
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.version_catalogue import VersionCatalogue
from tests.bundles import TABLE, export_table, make_run


@pytest.fixture
def settings(tmp_path, table_bundle, home) -> NodeSettings:
    return NodeSettings(
        bundle=table_bundle,
        model="heart",
        ca=home.root / "ca.crt",
        state=tmp_path / "node",
        tls=TlsSettings(disabled=True),
        tokens=TokenSettings(disabled=True),
        federation=None,
        crl=None,
        expired="accept",
    )


def test_a_node_that_starts_again_as_it_was_leaves_what_was_published_since(tmp_path, settings, table_source, home):
    node = NodeHome.make(settings.state)
    take_in(settings, node)
    with StateStore.open(node.database(None)) as store:
        first = read_plan(store, "heart").plan.stable
        for number in (2, 3):
            VersionCatalogue(store).add("heart", f"v{number}", f"{number}" * 64, "run", "ann")
            releases.pin(store, "heart", f"v{number}", "ann")
        take_in(settings, node)
        assert read_plan(store, "heart").plan.stable == "v3"
        other = export_table(table_source, home, tmp_path / "other")
        take_in(settings.model_copy(update={"bundle": other}), node)
        assert read_plan(store, "heart").plan.stable not in {first, "v3"}
        take_in(settings, node)
        assert read_plan(store, "heart").plan.stable == first


def test_a_run_whose_name_is_none_of_a_model_is_asked_for_one_before_anything_is_kept(tmp_path, settings, home):
    run = make_run(tmp_path / "heart disease", "tabular", TABLE, ModelSpec(name="mlp", args={"hidden": [4]}))
    bundle = export_table(load_source(run), home, tmp_path / "bundle")
    node = NodeHome.make(settings.state)
    with pytest.raises(UsageError, match="model=NAME: the bundle's run is called 'heart disease'"):
        take_in(settings.model_copy(update={"bundle": bundle, "model": None}), node)
    with StateStore.open(node.database(None)) as store:
        assert VersionCatalogue(store).models() == []
    take_in(settings.model_copy(update={"bundle": bundle}), node)


def test_a_changed_breaker_holds_from_the_nodes_next_start_on_for_every_model_in_the_store(settings):
    node = NodeHome.make(settings.state)
    take_in(settings, node)
    with StateStore.open(node.database(None)) as store:
        controller.add_version(store, "another", "v1", "ann", 1.0)
        assert read_plan(store, "heart").plan.breaker == BreakerPolicy()
        policy = BreakerPolicy(window=20, least_calls=5)
        take_in(settings.model_copy(update={"breaker": policy}), node)
        assert [read_plan(store, model).plan.breaker for model in ("heart", "another")] == [policy, policy]
