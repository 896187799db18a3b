"""The models of a node: the store of verified bundles, the graphs made of them, batching, and the pool in memory."""
