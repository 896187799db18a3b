"""What a model card says of a run's last evaluation."""

from types import SimpleNamespace

from fedclaw.export.card import _metrics
from fedclaw.learning.tasks.classification import Classification

LINE = {
    "round": 3,
    "metrics": {"accuracy": 0.61, "auroc": 0.55, "recall": 0.975},
    "test_examples": 80,
    "over_sites": {"recall": {"mean": 0.9, "spread": 0.05, "sites": 2}},
    "by_class": {"a|b": {"precision": 0.5, "recall": 1.0, "f1": 2 / 3}},
    "auroc": {"bound": 0.01, "interval": [0.53, 0.57]},
    "majority": {"label": "no", "accuracy": 0.63},
}


def card(line):
    schema = SimpleNamespace(task=Classification(("no", "yes")))
    record = SimpleNamespace(simulated=None)
    return _metrics(SimpleNamespace(metrics=[line], schema=schema, compression=None, record=record))


def test_the_figures_of_all_examples_stand_before_the_means_over_sites():
    text = card(LINE)
    assert "| recall | 0.9750 | 0.9000, 0.0500 |" in text
    assert "accuracy of always 'no' | 0.6300" in text
    assert "it lies in [0.5300, 0.5700]" in text
    assert "0.6667" in text
    assert "The model does not beat the majority class" in text


def test_a_line_of_an_older_run_is_a_card_too():
    text = card({"round": 3, "metrics": {"accuracy": 0.875}, "test_examples": 40})
    assert "| accuracy | 0.8750 |" in text
    assert "majority" not in text
