"""Measurements of what FedClaw promises. Each prints a table for people, then one JSON object as its last line."""
