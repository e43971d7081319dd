"""The programs that run in jobs, one a stage kind: `python -m launcher.workers.KIND stage.json`."""
