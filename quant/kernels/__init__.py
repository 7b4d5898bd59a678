"""Kernels that need more than torch: imported only where they run."""
