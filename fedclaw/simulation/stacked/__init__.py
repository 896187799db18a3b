"""Layers whose every example may have parameters of its own client: one call for all clients of a stack."""
