"""prism-launch: mid-training and RL pipelines for Slurm clusters, from one YAML recipe."""

__version__ = "0.1.0"
