"""What a run's record is made of: a wrong model is wrong use, told with the setting's name; a task is not guessed."""

import pytest

from fedclaw.errors import PluginError, UsageError
from fedclaw.protocol.terms import LocalTraining, RoundRules
from fedclaw.server.session import make_record, task_of
from fedclaw.server.settings import RunSettings, WorkloadChoice
from tests.samples import run_record

SCHEMA = """
columns: [{name: age, kind: numeric}]
target: {name: died, labels: ["no", "yes"]}
"""


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"name": "logistc"}, r"^workload\.model: no model is called 'logistc' here; there are: .*logistic"),
        ({"name": "mlp", "args": {"hiden": [8]}}, r"^workload\.model: model 'mlp': hiden: "),
        ({"name": "linear"}, r"^workload\.model: model 'linear' gives a number, and the schema's task is classif"),
    ],
)
def test_a_model_that_there_is_not_is_wrong_use(tmp_path, model, words):
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    settings = RunSettings(
        workload=WorkloadChoice(name="tabular", schema_file=tmp_path / "schema.yaml", model=model),
        strategy={"name": "fedavg"},
        training=LocalTraining(epochs=1, batch_size=8, learning_rate=0.1),
        privacy=None,
        rounds=1,
        seed=0,
    )
    with pytest.raises(UsageError, match=words):
        make_record(settings, "clinic", None, RoundRules())


def test_the_task_of_a_workload_that_is_not_installed_is_the_records_word_or_an_error():
    assert task_of(run_record(workload="elsewhere", metrics=("loss",))).name == "classification"
    with pytest.raises(PluginError, match="elsewhere"):
        task_of(run_record(workload="elsewhere", task="regression", metrics=("loss",)))
