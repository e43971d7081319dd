"""Durations, sizes and counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import units


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("4:00:00", 14400),
        ("2-12", 216000),
        ("1-0:30", 88200),
        ("1-02:03:04", 93784),
    ],
)
def test_slurm_time_limits(text: str, seconds: int) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "4h", "1:2:3:4", "-5", "1-", "soon", "1:00:00\n#SBATCH x"])
def test_what_is_no_time_limit(text: str) -> None:
    with pytest.raises(ValueError, match="no time limit"):
        units.parse_duration(text)


@given(st.integers(0, 10**7))
def test_durations_round_trip(seconds: int) -> None:
    assert units.parse_duration(units.slurm_duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.96, "1 min 00 s"), (125, "2 min 05 s"), (7800, "2 h 10 min"), (270000, "3 d 3 h")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text


def test_bytes_and_counts_for_people() -> None:
    assert [units.format_bytes(n) for n in (512, 3.4 * 2**20, 2**41)] == ["512 B", "3.4 MiB", "2.0 TiB"]
    assert [units.format_count(n) for n in (244, 16400, 1e6, 27e9)] == ["244", "16.4 k", "1 M", "27 B"]


def test_figures_keep_the_digits_that_mean_something_whatever_their_size() -> None:
    assert [units.significant(x) for x in (958.27, 0.000123456, 123456.0, 0.0)] == [958.3, 0.0001235, 123500.0, 0.0]
