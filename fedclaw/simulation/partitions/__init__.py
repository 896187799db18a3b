"""Ways of dealing a data set's rows to clients: evenly, by label, size, instrument, or where the rows are from."""
