"""Sweeps, the demo and the benchmarks. Imports FedClaw; nothing imports it."""
