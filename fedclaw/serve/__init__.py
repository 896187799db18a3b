"""A node that answers requests from signed bundles, on-premises: `python -m fedclaw.serve`."""
