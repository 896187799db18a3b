"""What people look at: progress and summaries in the terminal, and MLflow."""
