"""All that runs at the coordinator: runs and their directories, cohorts, the exchange with them, checkpoints."""
