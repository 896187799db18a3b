"""The walk from a bundle to ledgers: what is at hand is held against it, and what contradicts is named.

The run, the sites' directories and the federation are real ones of an earlier commit; the bundle is made today.
"""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from fedclaw.compress.intervals import Difference
from fedclaw.compress.record import RECORD, Compression, SearchChoice, SitesReport
from fedclaw.encryption import main as encrypt
from fedclaw.errors import UsageError
from fedclaw.export import layout
from fedclaw.export.bundle import Request, _sign, export_bundle
from fedclaw.export.check import Trust
from fedclaw.export.lineage import AtHand, Link, lineage, recovery_of
from fedclaw.export.source import load_source
from fedclaw.export.statement import state
from fedclaw.identity.data_keys import load_keyring
from fedclaw.identity.federation_home import FederationHome
from fedclaw.ledger import main as ledger_command
from fedclaw.lineage import main
from fedclaw.server.run_directory import RunDirectory

PAST = Path(__file__).parents[1] / "past" / "8eca11f"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A federation, three sites and a run of theirs; its bundles, as trained and compressed, are in the run."""
    root = tmp_path_factory.mktemp("lineage")
    shutil.copytree(PAST, root, dirs_exist_ok=True)
    for path in (*root.glob("federation/**/*"), *root.glob("sites/*/keys/*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    run = RunDirectory(root / "runs" / "local")
    shutil.rmtree(run.root / "bundle")
    home = FederationHome.open(root / "federation")
    export_bundle(load_source(run, "final"), home.signer(), run.root / "bundle", Request(floor=0.6))
    export_bundle(load_source(run), home.signer(), run.root / "small", Request())
    return root


@pytest.fixture
def place(made, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def walk(root: Path, *sites: str, bundle: str = "bundle", **at_hand) -> Link:
    given = {"federation": root / "federation", "ledgers": tuple(root / "sites" / name for name in sites), **at_hand}
    trust = Trust(authority=(PAST / "federation" / "ca.crt").read_bytes())
    return lineage(root / "runs" / "local" / bundle, trust, AtHand(**given))


def links(link: Link) -> list[Link]:
    return [link, *(inner for below in link.below for inner in links(below))]


def states(link: Link) -> dict[str, str]:
    """By what it is of; heads by their beginning."""
    return {one.what: one.state for one in links(link)}


def wrong(link: Link) -> list[str]:
    return [f"{one.what}: {one.detail}" for one in links(link) if one.state == "contradicts"]


def test_the_walk_reaches_every_ledger_and_all_that_is_at_hand_verifies(made):
    found = walk(made, "ward-a", "ward-b", "ward-c")
    assert wrong(found) == []
    told = states(found)
    for what in ("run.json", "model.npz", "metrics.jsonl", "receipts.json", "configuration", "schema", "rounds"):
        assert told[what] == "verified", what
    assert told["last checkpoint"] == told["privacy statement"] == told["certificate"] == "verified"
    heads = [one for one in links(found) if one.what.startswith("ledger head")]
    assert [head.state for head in heads] == ["verified"] * 3
    assert all("2 charges come to what the receipt says" in head.detail for head in heads)
    assert told["release release"] == told["score"] == "verified"
    assert told["code"] == "not at hand", "this run began before code was noted"


def test_what_is_not_at_hand_is_said(made, tmp_path):
    alone = shutil.copytree(made / "runs" / "local" / "bundle", tmp_path / "bundle")
    found = lineage(alone, Trust(), AtHand())
    assert wrong(found) == []
    told = states(found)
    assert told["run local (training)"] == "not at hand"
    assert told["configuration"] == "told"
    assert [state for what, state in told.items() if what.startswith("ledger head")] == ["not at hand"] * 3
    assert "verified" not in {state for what, state in told.items() if what.startswith(("site", "code", "release"))}
    assert "anybody can make" in found.detail
    head = json.loads((alone / layout.TRAINING).read_bytes())["runs"][0]["ledger_heads"][0]["head"]
    assert any(f"ledger verify head={head}" in one.detail for one in links(found)), "where to look is told"


def test_a_bundle_of_an_earlier_commit_has_a_lineage_as_far_as_it_tells():
    for commit in ("437d1ac", "8eca11f"):
        root = PAST.parent / commit
        sites = (root / "sites" / "ward-a", root / "sites" / "ward-b")
        found = lineage(root / "runs" / "local" / "bundle", Trust(), AtHand(None, root / "federation", sites))
        assert wrong(found) == []
        told = states(found)
        assert told["configuration"] == "not at hand"
        assert told["last checkpoint"] == "verified"
        heads = [state for what, state in told.items() if what.startswith("ledger head")]
        assert sorted(heads) == ["not at hand", "verified", "verified"]


def test_a_bundle_that_does_not_verify_is_walked_no_further(place):
    card = place / "runs" / "local" / "bundle" / layout.PRIVACY
    card.write_bytes(card.read_bytes() + b" ")
    found = walk(place, "ward-a")
    assert (found.state, found.below) == ("contradicts", ())
    assert layout.PRIVACY in found.detail


def append(name: str, text: str):
    def change(run: Path) -> None:
        path = run / name
        path.write_text(path.read_text() + text)

    return change


def replace(name: str, old: str, new: str):
    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))

    return change


def other_model(run: Path) -> None:
    directory = RunDirectory(run)
    directory.write_model({name: array + 1 for name, array in directory.read_model().items()})


CHANGED = {
    "the record": (append("run.json", "\n"), ["run.json: SHA-256"]),
    "what was asked for": (
        replace("run.json", '"learning_rate": 0.3', '"learning_rate": 0.4'),
        ["run.json: SHA-256", "configuration: "],
    ),
    "another schema": (replace("run.json", "100.0]", "101.0]"), ["run.json", "configuration", "schema"]),
    "the model": (other_model, ["model.npz: SHA-256", "last checkpoint: "]),
    "the metrics": (replace("metrics.jsonl", "0.7000", "0.9000"), ["metrics.jsonl: SHA-256", "rounds: "]),
    "a round less": (
        lambda run: (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().split("\n")[0] + "\n"),
        ["metrics.jsonl: SHA-256", "rounds: "],
    ),
    "a receipt": (
        replace("receipts.json", "1.9914", "1.0014"),
        ["receipts.json: SHA-256", "site ward-a", "site ward-b"],
    ),
    "an impossible receipt": (replace("receipts.json", '"rounds": 2', '"rounds": 0'), ["receipts.json", "site ward-a"]),
    "a damaged receipt": (replace("receipts.json", '"delta": 0.001', '"delta": 2'), ["run local (training): "]),
    "no checkpoint of the end": (lambda run: (run / "checkpoint-0002.ckpt").unlink(), ["last checkpoint: "]),
    "another run": (replace("run.json", '"run": "local"', '"run": "central"'), []),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_file_of_the_run_that_was_changed_is_named(place, what):
    change, expected = CHANGED[what]
    change(place / "runs" / "local")
    found = wrong(walk(place, run=place / "runs" / "local"))
    for words in expected or ["run local (training): the directory is that of run central"]:
        assert any(line.startswith(words) for line in found), (words, found)


def test_another_runs_directory_is_no_proof(made):
    """That the bundle lies in, or is given."""
    found = walk(made, run=made / "runs" / "central")
    assert "run local (training): the directory is that of run central" in wrong(found)
    with pytest.raises(UsageError, match="is not a run directory"):
        walk(made, run=made)


def sign_again(bundle: Path, home: FederationHome) -> None:
    for name in layout.UNSIGNED:
        (bundle / name).unlink(missing_ok=True)
    _sign(bundle, home.signer(), bundle.name)


def test_a_site_of_a_name_that_no_site_can_have_is_no_path(place):
    bundle = place / "runs" / "local" / "bundle"
    text = (bundle / layout.PRIVACY).read_text()
    name = json.loads(text)["sites"][0]["site"]
    (bundle / layout.PRIVACY).write_text(text.replace(json.dumps(name), json.dumps("../ca")))
    sign_again(bundle, FederationHome.open(place / "federation"))
    assert any("'../ca' cannot be used" in found for found in wrong(walk(place)))


def test_a_coordinator_that_signs_less_than_its_sites_spent_is_found_by_one_ledger(place):
    """Its own files agree with the lie: receipts.json is what it exports from."""
    run = RunDirectory(place / "runs" / "local")
    plain = json.loads(run.receipts_path.read_text())
    for name in plain:
        plain[name]["receipt"] |= {"epsilon_run": 0.5}
    run.receipts_path.write_text(json.dumps(plain))
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    run.metrics_path.write_text("".join(json.dumps({**line, "epsilon": {}}) + "\n" for line in lines))
    shutil.copytree(run.root / "bundle", run.root / "lie")
    told = load_source(run, "final")
    statement = json.loads((run.root / "lie" / layout.PRIVACY).read_text())
    for site in statement["sites"]:
        site["epsilon"] = site["runs"][0]["epsilon"] = 0.5
    statement["overall"]["epsilon"] = 0.5 + statement["statistics"]["epsilon"]
    (run.root / "lie" / layout.PRIVACY).write_text(json.dumps(statement))
    (run.root / "lie" / layout.TRAINING).write_text(told.training().model_dump_json())
    sign_again(run.root / "lie", FederationHome.open(place / "federation"))
    assert wrong(walk(place, bundle="lie")) == [], "nobody can see it without a ledger"
    (found,) = wrong(walk(place, "ward-b", bundle="lie"))
    assert "epsilon 0.5 is claimed, and its charges come to 1.991" in found


def test_an_old_copy_of_a_ledger_is_named(place):
    """Cut off before the run, whole by its own chain: its site's own books show it, and so does its bare file."""
    site = place / "sites" / "ward-a"
    shutil.copy(place / "ledgers" / "discrete.sqlite", site / "state" / "ledger.sqlite")
    (told,) = wrong(walk(place, "ward-a"))
    assert told.startswith("ledger ward-a: ")
    (told,) = wrong(walk(place, ledgers=(site / "state" / "ledger.sqlite",)))
    assert "the ledger of none of these sites" in told


def test_a_ledger_of_the_same_site_begun_anew_is_named(place):
    printed = io.StringIO()
    ledger_command(["show", f"site={place / 'sites' / 'ward-b'}", "json=true", "entries=true"], Console(file=printed))
    path = place / "ward-a.json"
    path.write_text(printed.getvalue())
    assert wrong(walk(place, ledgers=(path,))) == [], "it is ward-b's, whoever the file says"
    shutil.copytree(place / "sites" / "ward-b" / "state", place / "sites" / "ward-a" / "state", dirs_exist_ok=True)
    shutil.copy(place / "sites" / "ward-b" / "ledger.json", place / "sites" / "ward-a" / "ledger.json")
    (told,) = wrong(walk(place, "ward-a"))
    assert "is not in this ledger of" in told


def test_a_site_that_the_coordinator_never_approved_is_named(place):
    (place / "federation" / "sites" / "ward-c.json").unlink()
    assert wrong(walk(place)) == ["certificate: the coordinator's directory has no record of such a site"]


def test_a_run_that_is_encrypted_is_walked_with_its_key(place, tmp_path):
    """The digests are those of what is in the clear, so the bundle goes on leading there, whatever the key."""
    run = place / "runs" / "local"
    encrypt(["new-key", f"key=file:{tmp_path / 'run.key'}"])
    encrypt(["seal", str(run), f"key=file:{tmp_path / 'run.key'}"])
    closed = states(walk(place, bundle="small"))
    assert (closed["model.npz"], closed["last checkpoint"]) == ("not at hand", "not at hand")
    assert closed["run.json"] == closed["receipts.json"] == closed["compression"] == "verified"
    keys = load_keyring(f"file:{tmp_path / 'run.key'}")
    opened = walk(place, bundle="small", keys=keys)
    assert wrong(opened) == []
    assert states(opened)["model.npz"] == states(opened)["last checkpoint"] == "verified"
    sealed = bytearray((run / "model.npz").read_bytes())
    sealed[-1] ^= 1
    (run / "model.npz").write_bytes(sealed)
    assert [line.partition(":")[0] for line in wrong(walk(place, keys=keys))] == ["model.npz", "last checkpoint"]
    encrypt(["new-key", f"key=file:{tmp_path / 'other.key'}"])
    other = wrong(walk(place, keys=load_keyring(f"file:{tmp_path / 'other.key'}")))
    assert other[0].startswith("model.npz: ")


def test_the_compression_is_a_link_of_its_own(place):
    found = walk(place, bundle="small")
    assert wrong(found) == []
    assert states(found)["compression"] == "verified"
    compressed = place / "runs" / "local" / "compressed" / "compression.json"
    compressed.write_text(compressed.read_text().replace('"seed": 0', '"seed": 1'))
    (told,) = wrong(walk(place, bundle="small"))
    assert "compression.json has another digest than at export" in told
    other_model(place / "runs" / "local")
    assert any("was not made from this run's model.npz" in line for line in wrong(walk(place, bundle="small")))


@pytest.mark.parametrize("chosen", [True, False])
def test_recovery_at_the_sites_is_a_run_of_its_own_on_the_same_ledgers(place, chosen):
    """Another run of the same sites stands for it, or for that of a candidate that a search left: they were charged for
    that, too."""
    run = RunDirectory(place / "runs" / "local")
    shutil.copytree(place / "runs" / "central", run.root / "distillation" / "central")
    told = Compression.model_validate_json((run.compressed / RECORD).read_bytes())
    report = SitesReport(run="central", directory="distillation/central", rounds=2, epsilon={})
    choice = SearchChoice(
        precision="float32",
        loss=0.1,
        candidates=2,
        measure="agreement",
        score=0.9,
        difference=Difference(value=0, interval=None),
        at_sites=(report,),
    )
    noted = {"recovery": (report,)} if chosen else {"recovery": (), "search": choice}
    (run.compressed / RECORD).write_text(told.model_copy(update=noted).model_dump_json())
    source = load_source(run)
    bundle = shutil.copytree(run.root / "small", run.root / "recovered")
    statement = state(source.receipts, source.record.privacy, "", statistics=source.record.statistics)
    (bundle / layout.PRIVACY).write_text(statement.model_dump_json())
    (bundle / layout.TRAINING).write_text(source.training().model_dump_json())
    (bundle / layout.COMPRESSION).write_bytes(source.report)
    sign_again(bundle, FederationHome.open(place / "federation"))
    found = walk(place, "ward-a", "ward-b", bundle="recovered")
    assert wrong(found) == []
    runs = [link for link in found.below if link.what.startswith("run ")]
    assert [run.what for run in runs] == ["run local (training)", "run central (recovery after pruning)"]
    for link in runs:
        heads = [one.state for one in links(link) if one.what.startswith("ledger head")]
        assert sorted(heads) == ["not at hand", "verified", "verified"]
    (run.root / "distillation" / "central" / "receipts.json").unlink()
    found = walk(place, bundle="recovered")
    assert [state for what, state in states(found).items() if what == "receipts.json"] == ["not at hand"]


@pytest.mark.parametrize("directory", ["../central", "/nowhere", ".."])
def test_a_recovery_outside_of_the_runs_directory_is_not_looked_for(place, directory):
    run = RunDirectory(place / "runs" / "local")
    told = Compression.model_validate_json((run.compressed / RECORD).read_bytes())
    report = SitesReport(run="central", directory=directory, rounds=2, epsilon={})
    (run.compressed / RECORD).write_text(told.model_copy(update={"recovery": (report,)}).model_dump_json())
    assert recovery_of(run, "central") is None


def test_what_others_named_is_no_command_to_a_terminal():
    link = Link.of("site \x1b[31mred\n[bold]x[/bold]", "told", "y" * 1000)
    assert link.what == "site [31mred [bold]x[/bold]"
    assert len(link.detail) == 400


# The command.


def say(*arguments: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    main([str(argument) for argument in arguments], console)
    return console.file.getvalue()


def test_the_tree_and_its_count(made):
    bundle, ca = made / "runs" / "local" / "bundle", made / "federation" / "ca.crt"
    text = say(bundle, f"ca={ca}", f"federation={made / 'federation'}", f"sites=[{made / 'sites' / 'ward-a'}]")
    assert text.startswith("bundle bundle  verified")
    assert "├── run local (training)  verified  its directory is at hand" in text
    assert text.splitlines()[-1].endswith(", 0 contradicts")


def test_for_machines(made, tmp_path):
    bundle = made / "runs" / "local" / "bundle"
    text = say(
        bundle, f"federation={made / 'federation' / 'federation.json'}", "json=true", f"output={tmp_path / 'l.json'}"
    )
    assert Link.model_validate_json(text) == Link.model_validate_json((tmp_path / "l.json").read_bytes())
    assert Link.model_validate_json(text) == walk(made, federation=None)


def test_a_contradiction_is_exit_code_one_and_one_line(place, command):
    other_model(place / "runs" / "local")
    done = command("fedclaw.lineage", str(place / "runs" / "local" / "bundle"))
    assert done.returncode == 1
    assert "model.npz  contradicts" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "2 link(s)" in line
    assert line.endswith("contradict what is at hand")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name one bundle"),
        (["a", "b"], "name one bundle"),
        (["{bundle}", "sites=[{run}]"], "site.yaml"),
        (["{bundle}", "run={bundle}"], "is not a run directory"),
        (["{bundle}", "output={run}"], "is a directory"),
    ],
)
def test_wrong_use(made, arguments, words):
    run = made / "runs" / "local"
    with pytest.raises(UsageError, match=words):
        say(*(argument.format(run=run, bundle=run / "bundle") for argument in arguments))


def test_it_needs_no_torch(made, process):
    """Nor ONNX: whoever audits installs neither."""
    bundle = made / "runs" / "local" / "bundle"
    heavy = {"torch", "flwr", "onnx", "onnxruntime", "mlflow"}
    code = f"import sys; from fedclaw.lineage import main; main([{str(bundle)!r}]); print({heavy!r} & set(sys.modules))"
    done = process("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


def test_source_is_not_touched_by_the_walk(made):
    """Reading writes nothing, neither to the run nor to a site."""
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    walk(made, "ward-a", "ward-b", "ward-c")
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()} == before
