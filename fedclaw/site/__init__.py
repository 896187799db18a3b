"""A site: its directory, its policy and ledger, and how it answers what a server asks."""
