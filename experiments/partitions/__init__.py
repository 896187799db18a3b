"""Who has which rows: one data set dealt to clients, described and plotted.

Ways of dealing are in `fedclaw.simulation.partitions`; `settings.PartitionSettings` there is the choice among them.
`dealing.deal_out` deals a data set by name, `in_memory` makes of it the arrays that a simulation trains on,
`description.describe` says what was dealt, `plot.draw` shows it.
"""
