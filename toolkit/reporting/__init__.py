"""Metrics, the status table, plots and the HTML report."""
