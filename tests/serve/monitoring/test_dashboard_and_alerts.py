"""deploy/monitoring: what the dashboard and the alerts name is what a node shows; promtool takes and tries them."""

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from fedclaw.serve.monitoring.metrics import DEFINITIONS

ROOT = Path(__file__).parents[3]
PLACE = ROOT / "deploy" / "monitoring"
PAGE = (ROOT / "docs" / "serving-monitoring.md").read_text()
DASHBOARD = json.loads((PLACE / "dashboard.json").read_text())
RULES = [rule for group in yaml.safe_load((PLACE / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
FROM_PROMETHEUS = {"instance", "job", "le"}


def promtool(*arguments: str, directory: Path = PLACE) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed")
    return subprocess.run([program, *arguments], cwd=directory, capture_output=True, text=True, timeout=120)


def metrics_in(expression: str) -> set[str]:
    """The definitions that an expression names. Raises KeyError for a metric that there is not."""
    found = set()
    for name in re.findall(r"(?<![:\w])fedclaw_serve_(\w+)", expression):
        histogram = re.fullmatch(r"(\w+)_(?:bucket|sum|count)", name)
        if histogram and histogram[1] in DEFINITIONS and DEFINITIONS[histogram[1]].kind == "histogram":
            name = histogram[1]
        assert name in DEFINITIONS, f"there is no metric fedclaw_serve_{name}"
        found.add(name)
    return found


def labels_in(expression: str) -> set[str]:
    """The labels that an expression selects and groups by."""
    grouped = [name for found in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for name in found.split(",")]
    selected = re.findall(r'(\w+)\s*(?:=~|!=|=)\s*"', expression)
    return {name.strip() for name in (*grouped, *selected)}


def test_every_query_is_of_metrics_and_labels_that_there_are():
    for panel in PANELS:
        for target in panel["targets"]:
            metrics = metrics_in(target["expr"])
            assert metrics, target["expr"]
            known = FROM_PROMETHEUS | {label for name in metrics for label in DEFINITIONS[name].shown_labels}
            told = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert labels_in(target["expr"]) | told <= known, target["expr"]


def test_every_metric_has_a_panel():
    shown = {name for query in QUERIES for name in metrics_in(query)}
    assert set(DEFINITIONS) - shown == set()


def test_the_dashboard_is_one_that_grafana_loads():
    """By the dashboard kind of Grafana's schema: what must be there, of which values."""
    assert DASHBOARD["schemaVersion"] >= 36
    assert (DASHBOARD["id"], DASHBOARD["uid"], DASHBOARD["title"]) == (None, "fedclaw-serve", "FedClaw serving")
    identifiers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert 0 < place["w"] <= 24 - place["x"]
        assert place["h"] > 0
    for panel in PANELS:
        assert panel["type"] in {"timeseries", "stat", "heatmap", "state-timeline", "table"}
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert set(panel["fieldConfig"]) == {"defaults", "overrides"}
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names) > 0
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert {name: one["type"] for name, one in variables.items()} == {
        "datasource": "datasource",
        "instance": "query",
        "model": "query",
    }
    used = set(re.findall(r"\$(\w+)", " ".join(QUERIES)))
    assert used - {"__rate_interval"} <= set(variables)
    for one in variables.values():
        metrics_in(str(one["query"]))


def test_no_panel_lies_over_another():
    def cells(panel):
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        return {(x, y) for x in columns for y in rows}

    for one, other in combinations(DASHBOARD["panels"], 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])


def test_prometheus_understands_every_query(tmp_path: Path):
    variables = {"$__rate_interval": "5m", "$model": ".*", "$instance": ".*"}
    rules = []
    for number, query in enumerate(QUERIES):
        for name, value in variables.items():
            query = query.replace(name, value)
        rules.append({"record": f"query:number_{number}", "expr": query})
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = promtool("check", "rules", "rules.yaml", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{len(rules)} rules found" in done.stdout


def test_alerts_are_of_metrics_that_there_are():
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    for rule in RULES:
        named = metrics_in(rule["expr"])
        of_rules = set(re.findall(r"\w+:\w+:\w+", rule["expr"]))
        assert of_rules <= recorded
        assert named or of_rules or rule["expr"].startswith("up{")
        if "alert" in rule:
            assert rule["labels"]["severity"] in {"info", "warning", "critical"}
            assert rule["annotations"]["summary"]


def test_promtool_takes_the_rules():
    done = promtool("check", "rules", "alerts.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RULES)} rules found" in done.stdout


def test_each_alert_fires_where_it_has_to_and_only_there():
    done = promtool("test", "rules", "alerts_test.yaml", "alerts_days_test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tried_both_ways():
    fires, silent = set(), set()
    for name in ("alerts_test.yaml", "alerts_days_test.yaml"):
        for test in yaml.safe_load((PLACE / name).read_text())["tests"]:
            for one in test["alert_rule_test"]:
                (fires if one.get("exp_alerts") else silent).add(one["alertname"])
    assert fires == silent == set(ALERTS)


def test_the_page_says_what_to_do_at_each_alert():
    for name, rule in ALERTS.items():
        assert f"| `{name}` | {rule['labels']['severity']} | " in PAGE


def test_promtool_takes_the_configuration(tmp_path: Path):
    """With the files that it names: a CA and a token."""
    shutil.copytree(PLACE, tmp_path / "prometheus")
    for name in ("ca.crt", "metrics.token"):
        (tmp_path / "prometheus" / name).write_text("")
    done = promtool("check", "config", "prometheus.yaml", directory=tmp_path / "prometheus")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RULES)} rules found" in done.stdout
    (job,) = yaml.safe_load((PLACE / "prometheus.yaml").read_text())["scrape_configs"]
    assert (job["job_name"], job["scheme"], job["tls_config"]["min_version"]) == ("fedclaw-serve", "https", "TLS13")
    assert job["authorization"]["credentials_file"]
    assert "insecure" not in (PLACE / "prometheus.yaml").read_text()
