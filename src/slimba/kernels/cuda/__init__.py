"""CUDA C++ kernels of the GPU engine, compiled at first use by NVRTC; `runtime/backends/cuda.py` calls them.

`compiler.py` turns the sources into a module for the GPU at hand, `driver.py` loads and launches it. Neither imports
torch or links against it.
"""
