"""Scores: perplexity, divergence from the original, lm-eval tasks."""
