"""Compile, cache and launch CUDA C++ at run time: the only importers of ``cuda``."""
