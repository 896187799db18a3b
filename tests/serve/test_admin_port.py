"""The admin port beside its routes: what it keeps of the bundles that it took."""

from typing import Any

from fedclaw.serve.control import UNNEEDED_SECONDS, AdminPort
from fedclaw.serve.home import NodeHome, trust_of
from fedclaw.serve.settings import NodeSettings, TlsSettings, TokenSettings
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.supervisor import Launch, Ports


def test_a_bundle_that_no_version_has_any_more_is_removed_after_a_while(tmp_path, table_bundle, image_bundle, home):
    node = NodeHome.make(tmp_path / "node")
    settings = NodeSettings(
        bundle=table_bundle,
        ca=home.root / "ca.crt",
        state=node.root,
        tls=TlsSettings(disabled=True),
        tokens=TokenSettings(disabled=True),
        federation=None,
        crl=None,
        expired="accept",
    )
    unused: Any = None
    with StateStore.open(node.database(None)) as store:
        port = AdminPort(Launch(settings, Ports(1, None, 2), 0), store, unused, unused, unused)
        kept, left = (port.bundles.put(bundle, trust_of(settings)) for bundle in (table_bundle, image_bundle))
        for version, digest in (("v1", kept), ("v2", left)):
            port.catalogue.add("heart", version, digest, "run", "ann")
        port.tidy(0.0)
        port.catalogue.remove("heart", "v2")
        port.tidy(1.0)
        port.tidy(UNNEEDED_SECONDS)
        assert set(port.bundles.digests()) == {kept, left}
        port.catalogue.add("heart", "again", left, "run", "ann")
        port.tidy(UNNEEDED_SECONDS + 2.0)
        port.catalogue.remove("heart", "again")
        port.tidy(UNNEEDED_SECONDS + 3.0)
        assert set(port.bundles.digests()) == {kept, left}
        port.tidy(2 * UNNEEDED_SECONDS + 3.0)
        assert port.bundles.digests() == (kept,)
