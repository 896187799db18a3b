"""Workloads, one a file: a site's data to arrays, the model, the loss and the metrics.

Imported as `fedclaw.clients`: clients alone is anybody's name for a package.
"""

if __name__ != "fedclaw.clients":
    raise ImportError("this is fedclaw.clients; if FedClaw itself looks for clients, install it again (pip)")
