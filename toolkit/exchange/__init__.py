"""Records on a shared filesystem: the only place that names the files of a run."""
