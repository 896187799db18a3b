"""Many runs of one experiment: what belongs together, what is done already, and what it all came to."""

PROGRAM = "experiments.run"
"""What errors are said to be from."""
AGAIN = "give the same command again: a sweep goes on where it was"
"""What to do after a sweep was stopped, in one of its runs too."""
