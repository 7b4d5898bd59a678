"""Text → token batches → per-layer statistics."""
