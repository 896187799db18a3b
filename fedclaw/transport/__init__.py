"""Flower `Grid`s: how messages travel between the aggregation server and the sites."""
