"""Removing experts: criteria, choice, protection."""
