"""FedClaw's federation on Flower's simulation engine: simulated nodes over Ray, on one machine or a cluster.

    simulate_on_ray(directory, sites, RaySettings(cpus_per_site=1))

For whoever outgrows one machine; on one machine `fedclaw.simulation` is many times faster. It needs the extra `ray`.
"""

from fedclaw.runtime.ray.settings import RaySettings
from fedclaw.runtime.ray.simulate import require_ray, simulate_on_ray

__all__ = ["RaySettings", "require_ray", "simulate_on_ray"]
