"""Who may ask a node what, and how often: tokens, scopes, limits, TLS and what a connection may do."""
