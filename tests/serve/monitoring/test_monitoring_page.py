"""docs/serving-monitoring.md tells of every metric, as it is."""

from pathlib import Path

from fedclaw.serve.monitoring.metrics import CONTROL_METRICS, WORKER_METRICS

PAGE = (Path(__file__).parents[3] / "docs" / "serving-monitoring.md").read_text()


def test_the_tables_are_those_of_the_definitions():
    for definition in (*WORKER_METRICS, *CONTROL_METRICS):
        labels = ", ".join(f"`{label}`" for label in definition.shown_labels)
        assert f"| `{definition.full_name}` | {definition.kind} | {labels} | {definition.help} |\n" in PAGE
    assert PAGE.count("| `fedclaw_serve_") == len(WORKER_METRICS) + len(CONTROL_METRICS)
