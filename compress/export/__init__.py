"""Writing checkpoints that runtimes load, and checking that they do."""
