"""Attacks on a federation by its own sites, to try strategies on.

`simulate_attacked` runs the real loop over real sites some of which are hostile. `base` says what an attack may do,
`settings` which there are.
"""
