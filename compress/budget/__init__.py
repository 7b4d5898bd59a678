"""The allocation programs: who gets how many bytes."""
