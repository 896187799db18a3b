"""The deployment runtime: one long-lived, mutually authenticated gRPC stream per site, opened by the site."""
