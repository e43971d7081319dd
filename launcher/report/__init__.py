"""The report: `collect` gathers every number of a run, `page` draws it."""
