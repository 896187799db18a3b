"""Federated algorithms, one a file, each with its server half and its client half."""
