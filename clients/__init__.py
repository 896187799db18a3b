"""Workloads, one a file: a site's data to arrays, the model, the loss and the metrics."""
