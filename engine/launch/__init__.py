"""Files that start torchrun on many nodes, to be copied and filled in: `python -m athanor.launch slurm > job.sbatch` (README: docs/cluster.md).

They hold no logic of the engine: a node runs torchrun on `athanor.train`, and `environment.sh` is the one place for what the libraries below read.
"""
