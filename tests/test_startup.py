"""The first line comes before anything heavy is imported, and so does all that can be wrong without it."""

import pytest

from tests.commands import COMMANDS, watch
from tests.conftest import run_module


@pytest.mark.parametrize("module", COMMANDS)
def test_the_first_line_and_a_wrong_setting_need_no_heavy_library(module, tmp_path):
    started = watch(module, "nonsense=1", directory=tmp_path)
    assert started.text.startswith(f"\x1b[2m{module}: reading the settings")
    assert started.code == 2, started.text
    assert module in started.text.partition("\x1b[K")[2], "the first line is taken away, and the fault is told"
    assert "Traceback" not in started.text
    assert (started.first, started.last) == ([], [])


RUN = ("tracking=none", "workload.schema_file=schema.yaml")
DEEP = {
    "simulation and secagg": ("experiments.run", ("runtime=simulation", "secure=secagg"), "a simulation has none"),
    "single updates and secagg": ("experiments.run", ("strategy=krum", "secure=secagg"), "see every update by itself"),
    "loss and privacy": ("experiments.run", ("strategy=qfedavg",), "training data, which no noise covers"),
    "a strategy's setting": ("experiments.run", ("strategy=fedadam", "strategy.beta1=2"), "less than 1"),
    "a strategy's rounds": ("experiments.run", ("strategy=fedbuff", "strategy.buffer=9"), "9 answers"),
    "attack and Ray": ("experiments.run", ("runtime=ray", "attack=sign_flip"), "hostile sites"),
    "another workload's data": ("experiments.run", ("workload=vision",), "dataset=breast_cancer is for"),
    "a store that nobody keeps": ("experiments.run", ("tracking.uri=http://127.0.0.1:9",), "cannot be reached"),
    "a sweep's setting": ("experiments.run", ("-m", "rounds=many", "strategy=fedavg,krum"), "rounds"),
}


@pytest.mark.parametrize("what", DEEP)
def test_what_is_wrong_in_depth_is_told_before_torch_is_loaded(what, tmp_path):
    module, arguments, words = DEEP[what]
    started = watch(module, *arguments, directory=tmp_path)
    assert started.code in (1, 2), started.text
    assert words in " ".join(started.text.split())
    assert started.last == []


def test_a_server_tells_what_is_wrong_before_torch_is_loaded(deployment, tmp_path):
    new = (f"federation={deployment.federation}", f"workload.schema_file={deployment.schema}", f"runs={tmp_path}")
    for arguments, words in (
        (("strategy=median", "secure=secagg", "sites.minimum=3"), "see every update by itself"),
        (("strategy=fedbn", "strategy.server_learning_rate=-1"), "greater than 0"),
        (("run=../x",), "not usable"),
        (("workload.schema_file=nowhere.yaml",), "cannot be read"),
    ):
        started = watch("fedclaw.server", *new, *arguments, directory=tmp_path)
        assert started.code == 2, started.text
        assert words in " ".join(started.text.split())
        assert started.last == []


def test_what_is_loaded_is_said_before_it_is(deployment, tmp_path):
    """In a log, whose first line it is."""
    done = run_module("fedclaw.client", f"site={deployment.sites[0]}", "check")
    assert done.code == 0, done.errors
    assert done.errors.splitlines()[0].endswith("loading torch, Opacus and Flower")
