"""Keys, certificates and sealed updates: who is in a federation, and who can read what."""
