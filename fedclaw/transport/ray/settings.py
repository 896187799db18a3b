"""The resources of a machine, or of a cluster, that a simulation takes."""

import os
from importlib.util import find_spec
from typing import Any, Literal

from pydantic import Field

from fedclaw.errors import UsageError
from fedclaw.protocol.frozen import Frozen

LOOPBACK = "127.0.0.1"


class RaySettings(Frozen):
    """conf/runtime/ray.yaml: the resources that Ray is asked for. They change how long a run takes, nothing else."""

    name: Literal["ray"] = "ray"
    address: str | None = None
    """A running cluster's head, HOST:PORT; null: a cluster of this machine alone, which listens on loopback only."""
    cpus: int | None = Field(default=None, ge=1)
    """Cores of this machine to use; null: all. Not with an address."""
    cpus_per_site: float = Field(default=1.0, gt=0)
    """Cores for one site at work: so many sites work at once as fit."""
    gpus_per_site: float = Field(default=0.0, ge=0)
    """GPUs, or a share of one, for one site at work."""
    object_store: int | None = Field(default=None, ge=80 << 20)
    """Bytes of shared memory for messages; null: Ray's choice. Not with an address."""

    def prepare(self) -> None:
        """Call before Ray is imported. Keeps a cluster of this machine alone off the network: Ray has no password.

        Ray turns a loopback address into the machine's own, unless it is told that there are no clusters here.
        """
        if self.address is None:
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

    def backend(self) -> dict[str, Any]:
        """Flower's configuration of its backend."""
        return {
            "client_resources": {"num_cpus": self.cpus_per_site, "num_gpus": self.gpus_per_site},
            "init_args": {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": True, **self._init()},
        }

    def _init(self) -> dict[str, Any]:
        if self.address is not None:
            return {"address": self.address}
        chosen = {"num_cpus": self.cpus, "object_store_memory": self.object_store}
        return {"_node_ip_address": LOOPBACK, **{key: value for key, value in chosen.items() if value is not None}}


def require_ray() -> None:
    """Raises UsageError unless the extra `ray` is installed."""
    if find_spec("ray") is None:
        raise UsageError("the runtime ray needs the package ray: pip install 'fedclaw[ray]'")
