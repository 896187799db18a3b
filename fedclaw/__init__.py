"""FedClaw: federated learning that states what it cost in privacy.

Importing the package hardens the process first: telemetry of the libraries underneath is switched off and gRPC is held
to TLS 1.3, whatever the caller imports next (`fedclaw.environment`), and a command imports nothing from the directory
that it is run in (`fedclaw.search_path`).
"""

from fedclaw import environment as environment
from fedclaw.search_path import leave_out_current_directory

leave_out_current_directory()

__version__ = "0.1.0"
