"""A federation of site directories on Flower's simulation engine, over Ray.

    python -m fedclaw.transport.ray federation=NAME site_directories=DIR workload.schema_file=schema.yaml rounds=10
    python -m fedclaw.transport.ray federation=NAME site_directories=DIR resume=runs/NAME     go on with a run
    python -m fedclaw.transport.ray ... ray.cpus_per_site=0.5         two sites at work on one core
    python -m fedclaw.transport.ray ... ray.address=HOST:PORT         on a running cluster

DIR holds site directories (site.yaml, schema, data); they are only read: ledgers and logs lie in the run's directory.
Groups as for python -m fedclaw.server. It needs the extra ray: pip install 'fedclaw[ray]'.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.transport.ray", __doc__, plugins=True)

from collections.abc import Sequence
from pathlib import Path

from fedclaw import startup
from fedclaw.cli import run_main, settings_of
from fedclaw.errors import UsageError
from fedclaw.site.settings import SITE_FILE
from fedclaw.transport.flower.settings import FlowerSettings, observed, open_run
from fedclaw.transport.ray.settings import RaySettings, require_ray


class RaySimulation(FlowerSettings):
    """conf/ray.yaml, checked."""

    site_directories: Path
    ray: RaySettings = RaySettings()


def main(arguments: Sequence[str]) -> None:
    """Simulate as the command line says."""
    settings = settings_of(arguments, "ray", RaySimulation)
    require_ray()
    sites = sorted(path.parent for path in settings.site_directories.glob(f"*/{SITE_FILE}"))
    if not sites:
        raise UsageError(f"no directory in site_directories={settings.site_directories} holds a {SITE_FILE}")
    directory = open_run(settings)
    with startup.loading("Ray, torch and Flower"):
        from fedclaw.transport.ray.simulate import simulate_on_ray
    with observed(directory, settings.tracking) as observers:
        simulate_on_ray(directory, sites, settings.ray, observers, settings.sites)


if __name__ == "__main__":
    run_main("fedclaw.transport.ray", __doc__ or "", main)
