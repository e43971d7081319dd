"""Durations, sizes and counts: as Slurm and people write them, and as numbers. Pure."""

from __future__ import annotations

import re

#: Later than any time that a clock shows, in seconds: what a file says is not below it is damage.
NO_TIME = 1e11
_DURATION = re.compile(
    r"(?:(?P<days>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?"
    r"|(?P<h>\d+):(?P<hm>\d+):(?P<hs>\d+)|(?P<m>\d+):(?P<ms>\d+)|(?P<minutes>\d+))"
)


def parse_duration(text: str) -> int:
    """Seconds of a time limit as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is no time limit; write minutes, H:M:S or D-H:M:S")
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    days = part["days"] * 86400 + part["dh"] * 3600 + part["dm"] * 60 + part["ds"]
    hours = part["h"] * 3600 + part["hm"] * 60 + part["hs"]
    return days + hours + (part["m"] + part["minutes"]) * 60 + part["ms"]


def slurm_duration(seconds: int) -> str:
    """Seconds as sbatch takes them: D-HH:MM:SS or HH:MM:SS."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock


def format_duration(seconds: float) -> str:
    """Seconds for people: `8.2 s`, `3 min 05 s`, `2 h 10 min`, `3 d 4 h`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, whole = round(seconds) // 60, round(seconds) % 60
    if minutes < 60:
        return f"{minutes} min {whole:02} s"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def format_bytes(count: float) -> str:
    """Bytes for people, in powers of 1024: `512 B`, `3.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_count(count: float) -> str:
    """A count for people, in powers of 1000: `244`, `16.4 k`, `1 M`, `27 B`."""
    if count >= 1e15:
        return f"{count:.3e}" if count < 1e300 else "over 1e300"
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f}"


def significant(value: float, digits: int = 4) -> float:
    """A figure without the digits that mean nothing, for JSON."""
    return float(f"{value:.{digits}g}")


def memory_bytes(text: str) -> int | None:
    """`64G` of sbatch in bytes, MB where no unit is named; None for 0, which is all that a node has."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text)
    if match is None or not int(match[1]):
        return None
    return int(match[1]) << {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}[match[2]]
