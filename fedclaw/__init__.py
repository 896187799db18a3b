"""FedClaw: federated learning that states what it cost in privacy.

    import fedclaw

    federation = fedclaw.Federation.from_arrays(x, y, clients=100, partition="dirichlet", alpha=0.3)
    run = fedclaw.simulate(federation, MyNet, strategy="fedavg", rounds=20, learning_rate=0.1)
    run.metrics, run.epsilon, run.model()

The names of `__all__` are for notebooks and programs (docs/notebook.md); each is imported when it is first used.
Federations of real sites are run by commands: `fedclaw --help`.

Importing the package hardens the process first: telemetry of the libraries underneath is switched off and gRPC is held
to TLS 1.3, whatever the caller imports next (`fedclaw.environment`), and a command imports nothing from the directory
that it is run in (`fedclaw.search_path`).
"""

from typing import TYPE_CHECKING

from fedclaw import environment as environment
from fedclaw.search_path import leave_out_current_directory

leave_out_current_directory()

from fedclaw.lazy import on_demand  # noqa: E402 - not before the path is safe

if TYPE_CHECKING:
    from fedclaw.api.federation import Federation
    from fedclaw.api.reading import Bundle, read_bundle, read_ledger
    from fedclaw.api.runs import Run, read_run
    from fedclaw.api.simulation import CentralPrivacy, LocalPrivacy, simulate
    from fedclaw.errors import DataError, FedClawError, PluginError, PrivacyError, RoundError, UsageError
    from fedclaw.learning.strategy import Strategy
    from fedclaw.site.journal.spending import Spending

__version__ = "0.2.0"

__all__ = [
    "Bundle",
    "CentralPrivacy",
    "DataError",
    "FedClawError",
    "Federation",
    "LocalPrivacy",
    "PluginError",
    "PrivacyError",
    "RoundError",
    "Run",
    "Spending",
    "Strategy",
    "UsageError",
    "__version__",
    "read_bundle",
    "read_ledger",
    "read_run",
    "simulate",
]

__getattr__ = on_demand(
    __name__,
    {
        "Bundle": "fedclaw.api.reading",
        "CentralPrivacy": "fedclaw.api.simulation",
        "DataError": "fedclaw.errors",
        "FedClawError": "fedclaw.errors",
        "Federation": "fedclaw.api.federation",
        "LocalPrivacy": "fedclaw.api.simulation",
        "PluginError": "fedclaw.errors",
        "PrivacyError": "fedclaw.errors",
        "RoundError": "fedclaw.errors",
        "Run": "fedclaw.api.runs",
        "Spending": "fedclaw.site.journal.spending",
        "Strategy": "fedclaw.learning.strategy",
        "UsageError": "fedclaw.errors",
        "read_bundle": "fedclaw.api.reading",
        "read_ledger": "fedclaw.api.reading",
        "read_run": "fedclaw.api.runs",
        "simulate": "fedclaw.api.simulation",
    },
)


def __dir__() -> list[str]:
    return __all__
