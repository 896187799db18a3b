"""FedClaw: federated learning that states what it cost in privacy.

Importing the package hardens the process first (see `fedclaw.environment`): telemetry of the libraries
underneath is switched off and gRPC is held to TLS 1.3, whatever the caller imports next.
"""

from fedclaw import environment as environment

__version__ = "0.1.0"
