"""Who runs this. Standard library only."""

from __future__ import annotations

import os
import pwd


def user_name() -> str:
    """The name of this process's user; the number as text where no name belongs to it, as in a container.

    Slurm's commands take either. USER and LOGNAME are not asked: they are whatever a shell left there.
    """
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
