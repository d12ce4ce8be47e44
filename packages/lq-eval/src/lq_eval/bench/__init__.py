"""Benchmarks: each measures and yields rows; :mod:`lq_eval.results` keeps them, :mod:`lq_eval.plots` draws them."""
