"""Who runs this. Standard library only."""

from __future__ import annotations

import os
import pwd


def user_name(number: int | None = None) -> str:
    """The name of a user, this process's by default; the number as text where it has no name, as in a container.

    Slurm's commands take either. USER and LOGNAME are not asked: they are whatever a shell left there.
    """
    number = os.geteuid() if number is None else number
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
