"""What a run records, for tools and for people."""
