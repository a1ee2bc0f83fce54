"""Whole jobs: stages that resume, their time budget and report, the demo's data."""
