"""The round: what goes out, what comes back, the loop, checkpoints, the plug-in registry."""
