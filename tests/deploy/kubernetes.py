"""What is asked of every Kubernetes object, whichever tool rendered it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import kubernetes_validate

Object = Mapping[str, Any]

OLDEST, NEWEST = "1.31", "1.37"
UID = 10001


def validate(objects: Sequence[Object], version: str) -> None:
    """Raise ValidationError unless each object is one that this version of Kubernetes knows, field by field."""
    for one in objects:
        kubernetes_validate.validate(one, version, strict=True)


def of_kind(objects: Sequence[Object], kind: str) -> list[Object]:
    return [one for one in objects if one["kind"] == kind]


def pods(objects: Sequence[Object]) -> Iterator[Object]:
    """Template of each pod that the objects make: its metadata and its spec."""
    for one in objects:
        if one["kind"] in {"Deployment", "StatefulSet", "Job"}:
            yield one["spec"]["template"]


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def loopholes(pod: Object) -> Iterator[str]:
    """What the pod is allowed beyond Kubernetes' 'restricted' standard, and a read-only root file system."""
    spec = pod["spec"]
    security = spec.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("runAsUser") != UID:
        yield "may be root"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "seccomp"
    if spec.get("automountServiceAccountToken") is not False:
        yield "token of the service account"
    if any(spec.get(word) for word in ("hostNetwork", "hostPID", "hostIPC")):
        yield "namespaces of the host"
    if any("hostPath" in volume for volume in spec.get("volumes", [])):
        yield "files of the host"
    for container in containers(pod):
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            yield f"{container['name']} may gain privileges"
        if own.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{container['name']} has capabilities"
        if own.get("readOnlyRootFilesystem") is not True:
            yield f"{container['name']} writes to its image"
        if not {"cpu", "memory"} <= container.get("resources", {}).get("limits", {}).keys():
            yield f"{container['name']} has no limits"
        if re.search(r":latest$|^[^:@]+$", container["image"]):
            yield f"{container['name']} is of no version"


def matches(selector: Mapping[str, str], pod: Object) -> bool:
    return bool(selector) and selector.items() <= pod["metadata"]["labels"].items()


def loose_ends(objects: Sequence[Object]) -> Iterator[str]:
    """Names in one object that no other has: selectors of no pod, ports of no container, settings of no map."""
    made = list(pods(objects))
    ports = {port["name"] for pod in made for container in containers(pod) for port in container.get("ports", [])}
    for service in of_kind(objects, "Service"):
        if not any(matches(service["spec"].get("selector", {}), pod) for pod in made):
            yield f"Service {service['metadata']['name']} selects no pod"
        yield from (
            f"port {port['targetPort']}" for port in service["spec"]["ports"] if port["targetPort"] not in ports
        )
    for kind, path in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        for one in of_kind(objects, kind):
            if not any(matches(one["spec"].get(path, {}).get("matchLabels", {}), pod) for pod in made):
                yield f"{kind} {one['metadata']['name']} selects no pod"
    for policy in of_kind(objects, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            yield from (f"policy of port {port['port']}" for port in rule["ports"] if port["port"] not in ports)
    scaled = {(one["kind"], one["metadata"]["name"]) for one in objects}
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        if (target["kind"], target["name"]) not in scaled:
            yield f"nothing to scale: {target['name']}"
    accounts = {one["metadata"]["name"] for one in of_kind(objects, "ServiceAccount")}
    for pod in made:
        if pod["spec"]["serviceAccountName"] not in accounts:
            yield f"service account {pod['spec']['serviceAccountName']}"
        yield from _loose_in_pod(pod, objects)


def _loose_in_pod(pod: Object, objects: Sequence[Object]) -> Iterator[str]:
    volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
    volumes |= {
        claim["metadata"]["name"]
        for one in of_kind(objects, "StatefulSet")
        for claim in one["spec"].get("volumeClaimTemplates", [])
    }
    for container in containers(pod):
        yield from (f"volume {m['name']}" for m in container.get("volumeMounts", []) if m["name"] not in volumes)
        known = environment(container, objects)
        for argument in container.get("args", []):
            yield from (f"variable {name}" for name in re.findall(r"\$\((\w+)\)", argument) if name not in known)


def environment(container: Object, objects: Sequence[Object]) -> dict[str, str]:
    """The container's variables; one that the cluster fills in is there by its name."""
    maps = {one["metadata"]["name"]: one.get("data", {}) for one in of_kind(objects, "ConfigMap")}
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        values |= maps[source["configMapRef"]["name"]]
    return values | {one["name"]: one.get("value", one["name"].lower()) for one in container.get("env", [])}


def arguments(container: Object, objects: Sequence[Object]) -> list[str]:
    """The arguments as the container gets them."""
    values = environment(container, objects)
    return [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], one) for one in container["args"]]
