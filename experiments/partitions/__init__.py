"""Who has which rows: ways of dealing one data set to clients, described and plotted.

`settings.PartitionSettings` is the choice among iid, dirichlet, shards, quantity, feature_shift and natural; each has
`deal(targets, inputs, clients, generator) -> Partition`. `dealing.deal_out` deals a data set by name, `in_memory` makes
of it the arrays that a simulation trains on, `description.describe` says what was dealt, `plot.draw` shows it.
"""
