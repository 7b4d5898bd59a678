"""Fewer bits: grids, packing, solvers, allocation, packed experts."""
