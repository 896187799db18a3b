"""Things that go wrong, done to real nodes on purpose, and counted: `python -m experiments.chaos`."""
