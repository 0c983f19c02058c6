"""Launching: cluster profiles, job adapters, advance and supervise, status. Imports no torch."""
