"""What a run will need before anything runs: memory and time per rank for a model, a workload and a cluster, and the parallel layout that fits."""
