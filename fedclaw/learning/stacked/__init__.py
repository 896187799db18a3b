"""Engines that train many models side by side: one batch for all clients of a stack, each with its own parameters.

Knows nothing of a federation: layouts, packings of batches, stacked layers, optimisers on rows of parameters.
"""
