"""A real Slurm on this machine: slurmctld, slurmdbd with MariaDB, munge and one slurmd a pretended node.

`config` renders the configuration files (pure), `daemons` starts and ends processes, `nodes` gives each node its own
host name and network, `cluster` is a running cluster, `boot` prepares and stops one, `commands` is the command line.
Standard library only. Written for Slurm 22.05 as Debian 12 packages it.
"""
