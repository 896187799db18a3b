"""How much of a model can go, by how it is recovered: with privacy and without, and against both controls."""
