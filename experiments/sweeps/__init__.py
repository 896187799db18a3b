"""Many runs of one experiment: what belongs together, what is done already, and what it all came to."""

PROGRAM = "experiments.run"
"""What errors are said to be from."""
