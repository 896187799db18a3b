"""What the processes of a node, and both nodes of a pair, share and keep: plans, counts, decisions, feedback, audit."""
