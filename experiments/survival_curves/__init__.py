"""Kaplan-Meier curves over sites: pooled, by site, and with differential privacy; behind docs/survival_curves.md."""
