"""CUDA C++ kernels, compiled at run time by NVRTC. Importing this package loads no CUDA library."""
