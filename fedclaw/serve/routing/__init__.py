"""Which version of a model answers: plans, the choice for each request, and the decisions that change a plan."""
