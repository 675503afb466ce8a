"""Executors: who trains the runs of a grid, in this process, in local ones, on Ray, by Slurm or by torchrun's ranks."""
