"""What a node shows of itself: Prometheus metrics, traces, drift of its inputs."""
