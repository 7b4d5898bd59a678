"""Checkpoint folders in and out, and the workspace of a run."""
