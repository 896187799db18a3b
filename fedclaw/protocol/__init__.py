"""What crosses the wire: plans, questions, receipts, refusals, arrays. Frozen values."""
