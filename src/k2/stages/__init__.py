"""One file per node of the DAG; each holds `run`, nothing else."""
