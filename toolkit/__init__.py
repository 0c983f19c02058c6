"""Batch toolkit that aligns large language models with MetaAPO and its relatives on Slurm clusters."""

__version__ = "0.1.0"
