"""What stands in front of nodes."""
