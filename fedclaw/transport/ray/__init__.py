"""FedClaw's federation on Flower's simulation engine: simulated nodes over Ray, on one machine or a cluster.

    simulate_on_ray(directory, sites, RaySettings(cpus_per_site=1))

For whoever outgrows one machine; on one machine `fedclaw.simulation` is many times faster. It needs the extra `ray`.
"""

from typing import TYPE_CHECKING

from fedclaw.lazy import on_demand

if TYPE_CHECKING:
    from fedclaw.transport.ray.settings import RaySettings, require_ray
    from fedclaw.transport.ray.simulate import simulate_on_ray

__getattr__ = on_demand(
    __name__,
    {
        "RaySettings": "fedclaw.transport.ray.settings",
        "require_ray": "fedclaw.transport.ray.settings",
        "simulate_on_ray": "fedclaw.transport.ray.simulate",
    },
)

__all__ = ["RaySettings", "require_ray", "simulate_on_ray"]
