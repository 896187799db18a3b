"""Federated algorithms, one a file, each with its server half and its client half.

Imported as `fedclaw.strategies`: strategies alone is anybody's name for a package.
"""

if __name__ != "fedclaw.strategies":
    raise ImportError(
        "this is fedclaw.strategies; if FedClaw itself looked for strategies, install it again (pip install)"
    )
