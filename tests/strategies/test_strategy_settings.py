"""What a strategy is to the framework: a name that is found, settings that are checked, a conf file that agrees."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from fedclaw.learning.registry import STRATEGIES, installed, strategy_class
from fedclaw.protocol.terms import LocalTraining, ModelSpec, Plan

NAMES = tuple(sorted(installed(STRATEGIES)))
CONF = Path(__file__).resolve().parents[2] / "conf" / "strategy"


def test_there_is_a_conf_file_for_each_strategy_and_no_other() -> None:
    assert tuple(sorted(path.stem for path in CONF.glob("*.yaml"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_conf_file_states_every_setting_with_its_default(name: str) -> None:
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    cls = strategy_class(settings.pop("name"))
    assert cls.name == name
    assert settings == cls().model_dump(mode="json")
    assert cls.model_validate(settings) == cls()


@pytest.mark.parametrize("name", NAMES)
def test_what_travels_fits_the_plan(name: str) -> None:
    fields = dict(strategy_class(name)().client_fields())
    plan = Plan(
        federation="f",
        run="r",
        round=1,
        rounds=1,
        cohort=1,
        workload="tabular",
        schema_digest="0",
        model=ModelSpec(name="mlp"),
        strategy=name,
        strategy_fields=fields,
        training=LocalTraining(steps=1, batch_size=1, learning_rate=0.1),
        privacy=None,
    )
    assert Plan.model_validate_json(plan.model_dump_json()).strategy_fields == fields


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_checked_and_frozen(name: str) -> None:
    cls = strategy_class(name)
    for wrong in ({"server_learning_rate": 0}, {"server_learning_rate": float("nan")}, {"no_such_setting": 1}):
        with pytest.raises(ValidationError):
            cls.model_validate(wrong)
    with pytest.raises(ValidationError):
        cls().server_learning_rate = 2.0


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("fedavgm", {"momentum": 1}),
        ("fedavgm", {"momentum": -0.1}),
        ("fedprox", {"mu": -1}),
        ("fedadagrad", {"tau": 0}),
        ("fedadam", {"beta1": 1}),
        ("fedadam", {"beta2": -0.1}),
        ("fedadam", {"tau": -1}),
        ("fedyogi", {"beta2": 1}),
        ("fedyogi", {"beta1": "fast"}),
        ("fedyogi", {"tau": 0}),
        ("trimmed_mean", {"hostile": -1}),
        ("krum", {"hostile": 1.5}),
        ("multi_krum", {"keep": 0}),
        ("rfa", {"smoothing": 0}),
        ("rfa", {"iterations": 0}),
        ("norm_bounding", {"bound": 0}),
        ("centred_clipping", {"radius": -1}),
        ("centred_clipping", {"iterations": 0}),
    ],
)
def test_a_setting_out_of_range_is_refused(name: str, wrong: dict) -> None:
    with pytest.raises(ValidationError):
        strategy_class(name).model_validate(wrong)
