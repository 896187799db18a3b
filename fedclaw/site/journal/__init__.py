"""A site's journal: the privacy ledger, the outbound log, and how one is held against the other."""
