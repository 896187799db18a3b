"""The Kustomize manifests, as kubectl renders them: known to Kubernetes, confined, with settings that commands have."""

import copy
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from fedclaw.cli import compose_settings
from fedclaw.serve.settings import NodeSettings
from tests.deploy import kubernetes
from tests.deploy.kubernetes import Object, of_kind

MANIFESTS = Path(__file__).parents[2] / "deploy" / "kubernetes"
NODES = ("node/single", "node/replicated")
ALL = (*NODES, "coordinator", "site")

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@cache
def rendered(name: str) -> tuple[Object, ...]:
    done = subprocess.run(["kubectl", "kustomize", str(MANIFESTS / name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower(), done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def _container(objects: Sequence[Object]) -> Object:
    return next(kubernetes.pods(objects))["spec"]["containers"][0]


@pytest.mark.parametrize("name", ALL)
def test_kubernetes_knows_every_object(name: str):
    for version in (kubernetes.OLDEST, kubernetes.NEWEST):
        kubernetes.validate(rendered(name), version)


def test_a_field_that_kubernetes_does_not_know_is_found():
    objects = copy.deepcopy(rendered("site"))
    next(kubernetes.pods(objects))["spec"]["automountServiceAcountToken"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes.validate(objects, kubernetes.NEWEST)


@pytest.mark.parametrize("name", ALL)
def test_every_pod_is_confined(name: str):
    assert [loophole for pod in kubernetes.pods(rendered(name)) for loophole in kubernetes.loopholes(pod)] == []


@pytest.mark.parametrize("name", ALL)
def test_what_one_object_names_another_has(name: str):
    assert list(kubernetes.loose_ends(rendered(name))) == []


@pytest.mark.parametrize("name", ALL)
def test_secrets_are_named_and_never_written_down(name: str):
    assert of_kind(rendered(name), "Secret") == []


@pytest.mark.parametrize("name", NODES)
def test_arguments_of_a_node_are_its_settings(name: str):
    container = _container(rendered(name))
    settings = compose_settings("serve", kubernetes.arguments(container, rendered(name)), NodeSettings)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"https": settings.port, "grpc": settings.grpc_port, "admin": settings.admin.port}
    assert (settings.database is not None) == (name == "node/replicated")
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts[str(settings.state.parent)] is False
    for path in (settings.bundle, settings.ca, settings.tls.certificate, settings.tls.private_key):
        assert path is not None
        assert any(path.is_relative_to(mount) and only_read for mount, only_read in mounts.items()), path


@pytest.mark.parametrize("name", NODES)
def test_probes_ask_the_node_itself_over_tls(name: str):
    container = _container(rendered(name))
    asked = {probe: container[probe]["httpGet"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {probe["scheme"] for probe in asked.values()} == {"HTTPS"}
    assert {probe["port"] for probe in asked.values()} == {"https"}
    assert asked["livenessProbe"]["path"] == "/v2/health/live"
    assert asked["readinessProbe"]["path"] == "/v2/health/ready"


@pytest.mark.parametrize("name", NODES)
def test_a_node_is_closed_but_for_what_is_named(name: str):
    """Both directions are shut for the pod, and the peers' selectors are those of the peers, not of the node."""
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(rendered(name), "NetworkPolicy")}
    assert policies["fedclaw-node"]["policyTypes"] == ["Ingress", "Egress"]
    assert not policies["fedclaw-node"].keys() & {"ingress", "egress"}
    opened = {
        port["port"]: peer
        for policy in policies.values()
        for rule in (*policy.get("ingress", []), *policy.get("egress", []))
        for port in rule["ports"]
        for peer in (rule.get("from") or rule.get("to"))
    }
    assert opened["https"] == opened["grpc"] == {"namespaceSelector": {"matchLabels": {"fedclaw-clients": "true"}}}
    assert opened["admin"] == {"namespaceSelector": {"matchLabels": {"fedclaw-operators": "true"}}}
    assert opened[53]["podSelector"] == {"matchLabels": {"k8s-app": "kube-dns"}}
    assert opened.keys() == {"https", "grpc", "admin", 53} | ({5432} if name == "node/replicated" else set())


def test_replicas_are_the_autoscalers_and_never_fewer_than_two():
    (nodes,) = of_kind(rendered("node/replicated"), "StatefulSet")
    (scaler,) = of_kind(rendered("node/replicated"), "HorizontalPodAutoscaler")
    assert "replicas" not in nodes["spec"]
    assert scaler["spec"]["minReplicas"] == 2
    spread = nodes["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert ("kubernetes.io/hostname", "DoNotSchedule") in {(s["topologyKey"], s["whenUnsatisfiable"]) for s in spread}


def test_a_node_alone_is_one_for_its_state_is():
    objects = rendered("node/single")
    (node,) = of_kind(objects, "StatefulSet")
    assert node["spec"]["replicas"] == 1
    assert of_kind(objects, "HorizontalPodAutoscaler") == []


def test_one_disruption_at_a_time():
    for name in NODES:
        (budget,) = of_kind(rendered(name), "PodDisruptionBudget")
        assert budget["spec"]["maxUnavailable"] == 1


def test_there_is_one_client_of_a_site_and_nobody_reaches_it():
    (site,) = of_kind(rendered("site"), "StatefulSet")
    (policy,) = of_kind(rendered("site"), "NetworkPolicy")
    assert site["spec"]["replicas"] == 1
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy["spec"]


def test_a_run_that_is_done_is_not_begun_again():
    (job,) = of_kind(rendered("coordinator"), "Job")
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert {"FailJob": [2]}.items() <= {
        rule["action"]: rule.get("onExitCodes", {}).get("values") for rule in rules
    }.items()
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        (("securityContext",), {"runAsNonRoot": False}, "may be root"),
        (("hostNetwork",), True, "namespaces of the host"),
        (("automountServiceAccountToken",), True, "token of the service account"),
        (("containers", 0, "securityContext", "readOnlyRootFilesystem"), False, "node writes to its image"),
        (("containers", 0, "securityContext", "capabilities"), {"add": ["NET_ADMIN"]}, "node has capabilities"),
        (("containers", 0, "image"), "fedclaw-node:latest", "node is of no version"),
        (("containers", 0, "image"), "fedclaw-node", "node is of no version"),
    ],
)
def test_a_loophole_is_found(path: tuple[str | int, ...], value: object, found: str):
    pod = copy.deepcopy(next(kubernetes.pods(rendered("node/single"))))
    place = pod["spec"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert found in list(kubernetes.loopholes(pod))


def test_a_loose_end_is_found():
    objects = copy.deepcopy(rendered("node/single"))
    services = of_kind(objects, "Service")
    services[0]["spec"]["selector"]["app.kubernetes.io/name"] = "another"
    services[1]["spec"]["ports"][0]["targetPort"] = "metrics"
    _container(objects)["args"].append("device=$(DEVICE)")
    found = set(kubernetes.loose_ends(objects))
    assert found == {"Service fedclaw-node selects no pod", "port metrics", "variable DEVICE"}
