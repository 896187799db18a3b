"""Attack x strategy: docs/strategies/robust.md."""
