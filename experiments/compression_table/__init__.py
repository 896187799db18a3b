"""What compressed updates cost in accuracy: the table of docs/update_compression.md."""
