"""What is learned and how: strategies, tasks, the step loop, postprocessors, update compression."""
