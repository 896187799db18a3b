"""For KServe: a Triton model repository to put where the cluster reads, and the InferenceService that serves it.

serving.kserve.io/v1beta1, the predictor in its 'model' form, the Open Inference Protocol v2.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from fedclaw.errors import UsageError
from fedclaw.export.layouts.base import Deployable
from fedclaw.export.layouts.triton import write_triton
from fedclaw.files import write_atomic

MANIFEST, REPOSITORY = "inferenceservice.yaml", "repository"
_STORAGE = re.compile(r"(s3|gs|pvc|https?|hdfs|webhdfs|hf|oci|azure|file)://[^\s]+")
_NOT_IN_A_LABEL = re.compile(r"[^a-z0-9-]+")


def write_kserve(deployable: Deployable, directory: Path, storage: str | None) -> None:
    """Fill `directory`. `storage` is the URI at which the cluster will find what is in repository/.

    Raises UsageError without one.
    """
    if storage is None or not _STORAGE.fullmatch(storage):
        raise UsageError(
            "kserve needs storage=URI, where the cluster will find what is in repository/: s3://…, gs://…, pvc://…, "
            "https://… (quoted for the command line: 'storage=\"s3://models/heart\"')"
        )
    write_triton(deployable, directory / REPOSITORY)
    text = yaml.safe_dump(inference_service(deployable, storage), sort_keys=False, allow_unicode=False)
    write_atomic(directory / MANIFEST, text.encode())


def inference_service(deployable: Deployable, storage: str) -> dict[str, Any]:
    """The manifest as plain values."""
    name = _NOT_IN_A_LABEL.sub("-", deployable.name.lower()).strip("-")[:50].rstrip("-") or "model"
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": name if name[0].isalpha() else f"m-{name}",
            "annotations": {f"fedclaw/{key.replace('_', '-')}": value for key, value in deployable.provenance.items()},
        },
        "spec": {
            "predictor": {
                "automountServiceAccountToken": False,
                "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
                "model": {
                    "modelFormat": {"name": "triton", "version": "2"},
                    "protocolVersion": "v2",
                    "storageUri": storage,
                    "resources": {
                        "requests": {"cpu": "1", "memory": "1Gi"},
                        "limits": {"cpu": "2", "memory": "2Gi"},
                    },
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                        "readOnlyRootFilesystem": False,
                    },
                },
            }
        },
    }
