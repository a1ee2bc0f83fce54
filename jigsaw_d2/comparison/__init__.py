"""Comparisons of initialisations over seeds: plan, runs, statistics, report."""
