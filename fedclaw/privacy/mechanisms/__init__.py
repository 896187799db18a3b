"""How an answer may leave a site, one mechanism a file."""
