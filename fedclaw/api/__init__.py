"""What `import fedclaw` gives a notebook: simulate a federation on arrays or data frames, and read what runs leave.

No command line, no Hydra, no plug-in: `Federation` holds the data, `simulate` trains a torch module of the caller's own
with the server loop and the learning code of `fedclaw.simulation`, and `Run` is what came of it, which `Run.export`
signs as a bundle. Nothing is logged to MLflow and nothing printed.
"""
