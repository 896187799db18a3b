"""A file or directory that is not there is a wrong use, exit code 2, whichever command it is named to."""

import importlib

import pytest

from fedclaw.cli import make_console, report_failure
from fedclaw.identity import provisioning
from fedclaw.server.run_directory import RunDirectory
from tests.samples import run_record

PROVISION, LEDGER, SERVE = "fedclaw.provision", "fedclaw.ledger", "fedclaw.serve.__main__"
ALONE = ("tls.disabled=true", "tokens.disabled=true", "state={new}")
TLS = (
    "ca={federation}/ca.crt state={new} tls.certificate={federation}/server.crt tls.private_key="
    "{federation}/server.key tokens.jwks={schema} tokens.issuer=x tokens.audience=y"
)
SCHEMA = "workload.schema_file={schema}"
CASES = [
    ("fedclaw.server.__main__", ["federation={nowhere}"]),
    ("fedclaw.server.__main__", ["federation={federation}", "resume={nowhere}"]),
    ("fedclaw.server.__main__", ["federation={federation}", "workload.schema_file={nowhere}"]),
    ("fedclaw.server.__main__", ["federation={federation}", SCHEMA, "statistics={nowhere}", "tracking=none"]),
    ("fedclaw.statistics", ["federation={nowhere}", SCHEMA, "epsilon=1"]),
    ("fedclaw.statistics", ["federation={federation}", "workload.schema_file={nowhere}", "epsilon=1"]),
    ("fedclaw.client", ["site={nowhere}"]),
    ("fedclaw.client", ["check", "site={nowhere}"]),
    ("fedclaw.compress.__main__", ["run={nowhere}"]),
    ("fedclaw.compress.__main__", ["run={run}", "inputs={nowhere}"]),
    ("fedclaw.compress.__main__", ["run={run}", "evaluation={nowhere}"]),
    ("fedclaw.compress.__main__", ["run={run}", "controls=true", "labelled={nowhere}"]),
    ("fedclaw.compress.__main__", ["run={run}", "mode=federated", "federation={nowhere}"]),
    ("fedclaw.export.__main__", ["run={nowhere}", "federation={federation}"]),
    ("fedclaw.export.__main__", ["run={run}", "federation={nowhere}"]),
    ("fedclaw.export.__main__", ["run={run}", "federation={federation}", "inputs={nowhere}"]),
    ("fedclaw.export.__main__", ["run={run}", "federation={federation}", "threshold_data={nowhere}"]),
    ("fedclaw.verify", ["{nowhere}"]),
    ("fedclaw.layouts", ["triton", "{nowhere}", "output=x"]),
    ("fedclaw.layouts", ["triton", "{run}", "output=x", "ca={nowhere}"]),
    ("fedclaw.lineage", ["{nowhere}"]),
    ("fedclaw.lineage", ["{run}", "run={nowhere}"]),
    ("fedclaw.lineage", ["{run}", "federation={nowhere}"]),
    ("fedclaw.lineage", ["{run}", "sites=[{nowhere}]"]),
    ("fedclaw.verify", ["bundle={nowhere}"]),
    ("fedclaw.verify", ["{run}", "ca={nowhere}"]),
    ("fedclaw.verify", ["{run}", "federation={nowhere}"]),
    ("fedclaw.verify", ["{run}", "ca={federation}/ca.crt", "crl={nowhere}"]),
    ("fedclaw.predict", ["bundle={nowhere}", "input={schema}"]),
    ("fedclaw.predict", ["bundle={run}", "input={nowhere}"]),
    ("fedclaw.predict", ["bundle={run}", "input={schema}", "ca={nowhere}"]),
    ("fedclaw.predict", ["bundle={run}", "input={schema}", "federation={nowhere}"]),
    ("fedclaw.predict", ["bundle={run}", "input={schema}", "crl={nowhere}"]),
    ("fedclaw.predict", ["bundle={run}", "input={schema}", "constants={nowhere}"]),
    (SERVE, ["bundle={nowhere}", "ca={federation}/ca.crt", *ALONE]),
    (SERVE, ["models={{heart: {{bundle: '{nowhere}'}}}}", "ca={federation}/ca.crt", *ALONE]),
    (SERVE, ["bundle={run}", "ca={nowhere}", *ALONE]),
    (SERVE, ["bundle={run}", "federation={nowhere}", *ALONE]),
    (SERVE, ["bundle={run}", "ca={federation}/ca.crt", "crl={nowhere}", *ALONE]),
    (SERVE, ["bundle={run}", *TLS.split(), "tls.certificate={nowhere}"]),
    (SERVE, ["bundle={run}", *TLS.split(), "tls.private_key={nowhere}"]),
    (SERVE, ["bundle={run}", *TLS.split(), "tls.client_ca={nowhere}"]),
    (SERVE, ["bundle={run}", *TLS.split(), "tls.client_ca={federation}/ca.crt", "tls.client_crl={nowhere}"]),
    (SERVE, ["bundle={run}", *TLS.split(), "tokens.jwks={nowhere}"]),
    (SERVE, ["bundle={run}", *TLS.split(), "tokens.jwks_ca={nowhere}"]),
    (SERVE, ["bundle={run}", "ca={federation}/ca.crt", "database=file:{nowhere}", *ALONE]),
    (SERVE, ["publish", "bundle={nowhere}", "model=heart", "token=file:{schema}"]),
    (SERVE, ["publish", "bundle={run}", "model=heart", "token=file:{nowhere}"]),
    (SERVE, ["publish", "bundle={run}", "model=heart", "token=file:{schema}", "node_ca={nowhere}"]),
    (SERVE, ["token", "keys={nowhere}", "subject=me", "scopes=[predict:heart]"]),
    (SERVE, ["audit", "state={nowhere}"]),
    (LEDGER, ["show", "site={nowhere}"]),
    (LEDGER, ["verify", "site={nowhere}"]),
    (LEDGER, ["statement", "site={nowhere}"]),
    (LEDGER, ["begin-again", "site={nowhere}", "reason=lost"]),
    (PROVISION, ["request", "site={new}", "name=north", "descriptor={nowhere}"]),
    (PROVISION, ["approve", "federation={nowhere}", "request={schema}"]),
    (PROVISION, ["approve", "federation={federation}", "request={nowhere}"]),
    (PROVISION, ["install", "site={nowhere}", "certificate={schema}"]),
    (PROVISION, ["install", "site={enrolled}", "certificate={nowhere}"]),
    (PROVISION, ["renew", "federation={nowhere}"]),
    (PROVISION, ["renew", "site={nowhere}"]),
    (PROVISION, ["revoke", "federation={nowhere}", "site=north"]),
    (PROVISION, ["show", "federation={nowhere}"]),
    (PROVISION, ["show", "site={nowhere}"]),
    ("fedclaw.audit.__main__", [SCHEMA, "sites=[{nowhere}]"]),
    ("fedclaw.audit.__main__", ["workload.schema_file={nowhere}"]),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What is there, and what is not."""
    root = tmp_path_factory.mktemp("places")
    provisioning.initialise(root / "federation", "clinic", "127.0.0.1:9443")
    schema = root / "schema.yaml"
    schema.write_text(
        "columns: [{name: age, kind: numeric, center: 50, scale: 20}]\ntarget: {name: y, labels: [a, b]}\n"
    )
    RunDirectory.create(root / "run", run_record(federation="clinic"))
    provisioning.request_site(root / "enrolled", root / "federation" / "federation.json", "north")
    return {
        "enrolled": root / "enrolled",
        "nowhere": root / "nowhere",
        "new": root / "new",
        "federation": root / "federation",
        "schema": schema,
        "run": root / "run",
    }


def files(root):
    return sorted(str(path) for path in root.rglob("*") if path.name != ".lock")


@pytest.mark.parametrize(
    ("module", "arguments"), CASES, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_path_that_does_not_exist_is_a_wrong_use(module, arguments, places, capsys):
    before = files(places["nowhere"].parent)
    filled = [argument.format(**places) for argument in arguments]
    with pytest.raises(Exception) as failure:
        importlib.import_module(module).main(filled)
    assert report_failure(module, failure.value, make_console(stderr=True)) == 2, failure.value
    told = capsys.readouterr().err.splitlines()
    assert len([line for line in told if not line.startswith("see ")]) == 1, told
    assert str(places["nowhere"]) in told[0]
    assert files(places["nowhere"].parent) == before, "and nothing was begun"
