"""Comparisons of initialisations at equal budget, and the demo with its drawn data."""
