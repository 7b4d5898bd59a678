"""Several experts into one: grouping, combining."""
