"""Portable Triton kernels. Importing this package imports no Triton; its modules do when they are first used."""
