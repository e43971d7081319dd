"""`python -m launcher.site STAGE_JSON [PART]`: what a test job runs, in the batch step and in its steps."""

import importlib
import sys

PARTS = {
    "job": ("launcher.site.job", "run"),
    "nodes": ("launcher.site.probe", "look_at_node"),
    "imports": ("launcher.site.probe", "try_imports"),
    "signals": ("launcher.site.probe", "hear_signals"),
    "all-reduce": ("launcher.site.all_reduce", "reduce"),
}

if __name__ == "__main__":
    # Before anything that an older Python could not read, so that it is this line which the log shows.
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit(f"prism-launch: {sys.executable} is Python {sys.version.split()[0]}; 3.10 or newer is needed")
    module, function = PARTS[sys.argv[2] if len(sys.argv) > 2 else "job"]
    sys.exit(getattr(importlib.import_module(module), function)(sys.argv[1]))
