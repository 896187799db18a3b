"""What measures a node from outside: signed bundles, tokens, nodes and other servers as processes, and load."""
