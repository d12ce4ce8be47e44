"""Measured cuts: one table a GPU class ships here, the user's own takes precedence, the cost model serves everything else."""
