"""What a server asks is bounded, field by field, before anything is built of it, and what is told of it is short."""

import pytest
from pydantic import BaseModel, ValidationError

from fedclaw.protocol.frozen import explain
from fedclaw.protocol.statistics import StatisticsRequest
from fedclaw.protocol.terms import ModelSpec, Plan
from fedclaw.server.run_directory import RUN_NAME
from tests.samples import plan_of, run_record

LONG = "x" * (1 << 20)


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


HOSTILE_PLANS = {
    "run of a megabyte": {"run": LONG},
    "run over two lines": {"run": "run-1\nrun-2"},
    "run that turns the line round": {"run": "run-1\u202e"},
    "no run": {"run": ""},
    "federation": {"federation": LONG},
    "workload": {"workload": LONG},
    "strategy": {"strategy": LONG},
    "digest": {"schema_digest": LONG},
    "field's name": {"strategy_fields": {LONG: 1.0}},
    "many fields": {"strategy_fields": {f"f{n}": 1.0 for n in range(1000)}},
    "metrics": {"metrics": ["loss"] * 10_000},
    "metric's name": {"metrics": [LONG]},
    "personal": {"personal": [LONG]},
    "many personal": {"personal": ["a"] * 200_000},
    "round": {"round": 10**30},
    "cohort": {"cohort": 10**30},
    "argument's name": {"model": {"name": "logistic", "args": {LONG: 1}}},
    "argument's text": {"model": {"name": "logistic", "args": {"a": [LONG]}}},
    "many arguments": {"model": {"name": "logistic", "args": {"a": [0] * 100_000}}},
    "many in steps": {"model": {"name": "logistic", "args": {"a": [[0] * 100] * 1000}}},
    "deep arguments": {"model": {"name": "logistic", "args": {"a": deep(60)}}},
    "deep settings": {"strategy_settings": {"a": deep(60)}},
    "sites of a sum": {"secure": {"sites": [LONG, "b"]}},
    "length of a sum": {"secure": {"length": 10**30}},
}


def session(**changes):
    return {
        "session": "0" * 32,
        "sites": ["a", "b", "c"],
        "threshold": 2,
        "neighbours": 2,
        "minimum": 2,
        "length": 10,
        "step": 0.5,
        "tolerated": 1,
        **changes,
    }


def reason(kind: type[BaseModel], plain) -> str:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(plain)
    return explain(caught.value)


@pytest.mark.parametrize("case", HOSTILE_PLANS)
def test_a_plan_field_beyond_any_use_is_refused_in_a_short_line(case):
    plain = plan_of(run_record()).model_dump(mode="json") | {"secure": session()}
    assert Plan.model_validate(plain), "the plan without the change is in order"
    (field, value), *_ = HOSTILE_PLANS[case].items()
    told = reason(Plan, plain | ({"secure": session(**value)} if field == "secure" else {field: value}))
    assert told.startswith(field)
    assert len(told) < 1000
    assert told.isprintable()


def test_unknown_fields_are_named_briefly():
    plain = plan_of(run_record()).model_dump(mode="json") | {f"{LONG}{n}": 1 for n in range(20)}
    told = reason(Plan, plain)
    assert len(told) < 3000
    assert told.endswith("and 10 more")


def test_what_models_have_for_arguments_is_let_through():
    args = {"hidden": [64, 64], "name": "relu", "shapes": {"conv": [[1, 2], [3, 4]]}}
    assert ModelSpec(name="mlp", args=args).args == args


@pytest.mark.parametrize(
    "change", [{"run": LONG}, {"columns": [LONG]}, {"columns": ["a"] * 200_000}, {"cohort": 10**30}], ids=str
)
def test_so_is_a_request_for_statistics(change):
    plain = {
        "federation": "clinic",
        "run": "statistics-1",
        "cohort": 3,
        "workload": "tabular",
        "schema_digest": "0" * 64,
        "columns": ["a", "b"],
        "epsilon": 1.0,
        "delta": 1e-5,
    }
    assert StatisticsRequest.model_validate(plain)
    assert len(reason(StatisticsRequest, plain | change)) < 1000


def test_columns_named_twice_are_found_in_one_pass():
    """Each name is looked at once: a list that counts how often it is gone through."""

    class Counted(str):
        compared = 0

        def __eq__(self, other):
            Counted.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    names = tuple(Counted(f"c{n}") for n in range(3000))
    fields = plan_of(run_record()).model_dump(include={"federation", "run", "cohort", "workload", "schema_digest"})
    request = StatisticsRequest.model_construct(**fields, columns=(*names, names[0]), epsilon=1.0, delta=1e-5)
    Counted.compared = 0
    with pytest.raises(ValueError, match="'c0' more than once"):
        request._once()
    assert Counted.compared < 3 * len(names)


@pytest.mark.parametrize("name", ["run\n", "a" * 101, "-run", "", "a b", "../x", "<b>"])
def test_a_run_name_has_no_second_line(name):
    assert not RUN_NAME.match(name)
    assert RUN_NAME.match("run-1.2_x")
