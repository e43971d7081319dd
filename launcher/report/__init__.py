"""The report: `collect` gathers every number of a run, `page` shows them, `draw` draws them in a process of its own."""

from launcher.report.collect import collect
from launcher.report.terminal import render_table
from launcher.report.write import write_report

__all__ = ["collect", "render_table", "write_report"]
