"""Repairing what compression has put out of order."""
