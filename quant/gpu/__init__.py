"""Kernels that need Triton: nothing here is imported where it is missing."""
