"""The Helm chart, as Helm's own library renders it: the same objects as the Kustomize manifests."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import kubernetes
from tests.deploy.kubernetes import Object, of_kind
from tests.deploy.test_kubernetes import rendered

helm = pytest.importorskip("helm_python", reason="Helm's library is not installed: pip install 'fedclaw[helm]'")

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "model-server"
SEVERAL = {"replicaCount": 2, "database": {"existingSecret": "fedclaw-node-database"}}


def charted(values: dict[str, Any], name: str = "fedclaw-node") -> list[Object]:
    """The objects that the chart makes of these values."""
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(values, name=name, namespace="fedclaw").values()
    return [one for text in texts for one in yaml.safe_load_all(text) if one]


def _by_name(objects: tuple[Object, ...] | list[Object]) -> dict[tuple[str, str], Object]:
    """Without labels of the objects themselves, which nothing selects by."""
    found = {}
    for one in copy.deepcopy(list(objects)):
        one["metadata"].pop("labels", None)
        for claim in one["spec"].get("volumeClaimTemplates", []) if one["kind"] == "StatefulSet" else []:
            claim["metadata"].pop("labels", None)
        found[one["kind"], one["metadata"]["name"]] = one
    return found


def test_helm_has_nothing_to_say():
    assert helm.lint(str(CHART))["errors"] == []


@pytest.mark.parametrize(("name", "values"), [("node/single", {}), ("node/replicated", SEVERAL)])
def test_it_makes_what_kustomize_makes(name: str, values: dict[str, Any]):
    ours, theirs = _by_name(charted(values)), _by_name(rendered(name))
    assert ours.keys() == theirs.keys()
    for which, made in theirs.items():
        assert _unordered(ours[which]) == _unordered(made), which


def _unordered(value: Any) -> Any:
    """With volumes and mounts by name: a patch puts its own first."""
    if isinstance(value, dict):
        return {key: _unordered(inner) for key, inner in value.items()}
    if isinstance(value, list):
        named = all(isinstance(one, dict) and "name" in one for one in value)
        return sorted(map(_unordered, value), key=lambda one: one["name"]) if named else [*map(_unordered, value)]
    return value


@pytest.mark.parametrize("values", [{}, SEVERAL], ids=["one", "several"])
def test_it_holds_under_another_name(values: dict[str, Any]):
    objects = charted(values, "ecg")
    kubernetes.validate(objects, kubernetes.NEWEST)
    assert [loophole for pod in kubernetes.pods(objects) for loophole in kubernetes.loopholes(pod)] == []
    assert list(kubernetes.loose_ends(objects)) == []
    assert {one["metadata"]["name"].partition("-")[0] for one in objects} == {"ecg"}


def test_its_values_are_taken():
    values = {
        "replicaCount": 3,
        "database": {"existingSecret": "db"},
        "resources": {"requests": {"cpu": "4", "memory": "8Gi"}, "limits": {"cpu": "8", "memory": "16Gi"}},
        "storage": {"size": "80Gi", "storageClass": "fast"},
        "image": {"repository": "registry.example.org/node", "digest": f"sha256:{'0' * 64}"},
        "extraSettings": ["limits.body_bytes=1048576"],
    }
    objects = charted(values)
    (nodes,) = of_kind(objects, "StatefulSet")
    (scaler,) = of_kind(objects, "HorizontalPodAutoscaler")
    container = nodes["spec"]["template"]["spec"]["containers"][0]
    assert scaler["spec"]["minReplicas"] == 3
    assert container["resources"] == values["resources"]
    assert container["image"] == f"registry.example.org/node@sha256:{'0' * 64}"
    assert container["args"][-1] == "limits.body_bytes=1048576"
    claim = nodes["spec"]["volumeClaimTemplates"][0]["spec"]
    assert (claim["resources"]["requests"]["storage"], claim["storageClassName"]) == ("80Gi", "fast")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replicaCount": 2}, "database.existingSecret"),
        ({"replicaCount": 0}, "replicaCount"),
        ({"storage": {"size": "a lot"}}, "size"),
        ({"image": {"tag": "latest"}}, "tag"),
        ({"storage": {"sise": "1Gi"}}, "sise"),
        ({"extraSettings": ["--help"]}, "extraSettings"),
    ],
)
def test_values_that_cannot_work_are_refused(values: dict[str, Any], said: str):
    with pytest.raises(helm.HelmError, match=said):
        charted(values)
