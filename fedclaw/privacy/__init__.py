"""What privacy costs and how it is kept: accounting, ledger, policy, noise, private steps."""
