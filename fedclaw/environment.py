"""Process-wide switches that have to be set before the libraries that read them are imported."""

import os

# gRPC has no setting for the TLS version. A suite that needs a secret which nobody has leaves a TLS 1.2 peer without a
# shared cipher, whatever the certificate's key, while TLS 1.3 negotiates its own suites: so only TLS 1.3 is left.
TLS13_ONLY_CIPHERS = "ECDHE-PSK-CHACHA20-POLY1305"

os.environ |= {
    "GRPC_SSL_CIPHER_SUITES": TLS13_ONLY_CIPHERS,
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    # One row of a matrix product is rounded alike wherever it stands and whatever else is there: else one example moves
    # the gradients of others (fedclaw.privacy.steps). A guarantee rests on it, so no value that is there already stays.
    "MKL_CBWR": "AUTO,STRICT",
}
# fork() in a process with gRPC threads is never done here; its handlers only print warnings.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
