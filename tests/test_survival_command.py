"""python -m fedclaw.statistics survival, over real processes, wires and ledgers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fedclaw import statistics as command
from fedclaw.errors import FedClawError
from fedclaw.identity import provisioning
from fedclaw.server.statistics_release import read_release
from fedclaw.site.journal.reconciliation import check_site, site_spending
from tests.conftest import FEDERATION, Deployment, run_module
from tests.made_survival import make_survival_sites
from tests.ports import free_port


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[Deployment]:
    """Two sites of 400 rows whose policies let survival curves leave; their processes are stopped at the end."""
    directories = make_survival_sites(tmp_path, count=2, rows=400)
    federation = tmp_path / "federation"
    provisioning.initialise(federation, FEDERATION, f"127.0.0.1:{free_port()}")
    for directory in directories:
        asked = provisioning.request_site(directory, federation / "federation.json", directory.name)
        provisioning.accept(directory, provisioning.approve(federation, asked))
    deployment = Deployment(tmp_path, federation, directories, [])
    yield deployment
    for process in deployment.background:
        if process.process.poll() is None:
            process.kill()


def arguments_for(deployed: Deployment, *arguments: str, run: str = "first") -> tuple[str, ...]:
    common = (f"federation={deployed.federation}", f"workload.schema_file={deployed.schema}", f"runs={deployed.runs}")
    return (*common, f"run={run}", "epsilon=4", "delta=1e-4", *arguments)


ASKED = ("survival", "survival.time=days", "survival.event=outcome", "survival.event_level=dead", "survival.group=arm")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_curves_are_asked_drawn_charged_and_kept_openly_and_in_a_secure_sum(deployed: Deployment) -> None:
    clients = [deployed.client(index) for index in range(2)]
    secure = ("secure=secagg", "secure.largest_weight=500", "survival.ends=[250,500,1000]")
    for run, more in (("first", ()), ("masked", secure)):
        done = run_module("fedclaw.statistics", *arguments_for(deployed, *ASKED, *more, run=run))
        assert done.code == 0, done.errors
        for words in ("Survival by arm", "median", "risk", "log-rank test of all groups", "Cost by site", "north"):
            assert words in done.output
        release = read_release(deployed.runs / run / "statistics.json")
        assert release.survival is not None
        assert release.survival.log_rank is not None
        assert release.survival.log_rank.p_value < 0.05, "days are twice as long on the new arm"
        medians = [curve.median(release.survival.ends)[0] for curve in release.survival.groups.values()]
        assert medians[1] is None or (medians[0] or 0) < medians[1]
        assert all(receipt.epsilon_run is not None and receipt.epsilon_run <= 4 for receipt in release.sites.values())
        with Image.open(deployed.runs / run / "statistics.png") as picture:
            assert picture.format == "PNG"
    assert release.mechanism.placement == "secure sum"
    assert release.survival.ends == (250, 500, 1000)
    plain = json.loads((deployed.runs / "first" / "statistics.json").read_text())
    assert plain["survival"]["question"]["time"] == "days"
    for client in clients:
        assert client.stop() == 143
    for site in deployed.sites:
        check_site(site)
        (data_set,) = site_spending(site).data_sets
        assert {run.run: (run.charges, run.open) for run in data_set.runs} == {"first": (1, 0), "masked": (1, 0)}


WRONG = {
    "no time": (("survival", "survival.event=outcome"), "survival needs survival.time and survival.event"),
    "no word": (("survival.time=days",), "survival.time= goes with the word survival"),
    "no word, another setting": (("survival.group=arm",), "survival.group= goes with the word survival"),
    "columns too": ((*ASKED, "columns=[age]"), "two questions"),
    "another word": (("survivals",), "unknown command 'survivals'"),
    "another column": ((*ASKED, "survival.time=weeks"), "no column 'weeks' for the time"),
    "another level": ((*ASKED, "survival.event_level=1"), "no level '1' for the event; it has alive, dead"),
    "yes or no is no level": ((*ASKED, "survival.event_level=true"), "no level 'true' for the event"),
    "overlapping ends": ((*ASKED, "survival.ends=[2,1]"), "larger than the one before"),
    "no ends": ((*ASKED, "survival.ends=[]"), "either bins or ends"),
    "many bins": ((*ASKED, "survival.bins=1000000"), "survival.bins"),
    "scores too": ((*ASKED, "scores=runs/x"), "two questions"),
}


def test_wrong_use_is_one_line_and_asks_nobody(deployed: Deployment) -> None:
    for arguments, words in WRONG.values():
        with pytest.raises(FedClawError) as caught:
            command.main(arguments_for(deployed, *arguments))
        assert caught.value.exit_code == 2
        assert words in str(caught.value)
    assert not (deployed.runs / "first").exists()


def test_the_picture_goes_over_no_file_and_not_over_the_release(deployed: Deployment) -> None:
    """It did, after the sites had paid: out=curves.png held a picture, and nothing held the release."""
    kept = deployed.root / "kept.png"
    kept.write_text("a picture of mine")
    for out, words in (
        ("curves.png", "the picture of the curves goes there"),
        ("kept.json", "kept.png exists already"),
    ):
        with pytest.raises(FedClawError, match=words) as caught:
            command.main(arguments_for(deployed, *ASKED, f"out={deployed.root / out}"))
        assert caught.value.exit_code == 2
    assert kept.read_text() == "a picture of mine"
