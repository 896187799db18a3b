"""Engines that work out the sum of clipped per-example gradients, one a file; all give the same sum up to rounding."""
