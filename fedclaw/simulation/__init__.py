"""Thousands of simulated clients under the real server loop, in one process or over several.

`SimulatedFederation` is the clients' data, held once; `simulated` makes of a run's record that of a simulation;
`simulate_cohorts` runs it. Clients are trained one at a time on a lean step, or many at once as one batch, whichever is
faster; a result depends on the record and the data alone, not on the number of processes.
"""

from typing import TYPE_CHECKING

from fedclaw.lazy import on_demand

if TYPE_CHECKING:
    from fedclaw.simulation.federation import SimulatedFederation
    from fedclaw.simulation.run import simulate_cohorts, simulated
    from fedclaw.simulation.settings import SimulationSettings

__getattr__ = on_demand(
    __name__,
    {
        "SimulatedFederation": "fedclaw.simulation.federation",
        "SimulationSettings": "fedclaw.simulation.settings",
        "simulate_cohorts": "fedclaw.simulation.run",
        "simulated": "fedclaw.simulation.run",
    },
)

__all__ = ["SimulatedFederation", "SimulationSettings", "simulate_cohorts", "simulated"]
