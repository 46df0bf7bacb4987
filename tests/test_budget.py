import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan.formats.errors import UsageError
from bitplan.formats.sizes import SIZES, format_bytes, parse_size
from bitplan.planner.memory.budget import budget_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3MiB", 3 << 20),
        ("1234567B", 1234567),
        ("6GB", 6_000_000_000),
        ("1.5GiB", 3 << 29),
        ("10 kB", 10_000),
        ("10KB", 10_000),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@given(st.integers(1, 10**15), st.sampled_from(sorted(SIZES)))
def test_whole_numbers_are_exact(number, unit):
    assert parse_size(f"{number}{unit}") == number * SIZES[unit]


@pytest.mark.parametrize("text", ["3gb", "3Gb", "3mb", "3gib"])
def test_bits_or_bytes(text):
    with pytest.raises(UsageError, match="bits or bytes: write 3"):
        parse_size(text)


@pytest.mark.parametrize("text", ["3", "", "much", "-3GB", "0GB", "nanGB", "3XB", "1e9B", "infGB"])
def test_no_sizes(text):
    with pytest.raises(UsageError):
        parse_size(text)


def test_one_way_of_saying():
    assert budget_bytes("3MiB", None, None, 10**6) == (3 << 20, "3MiB")
    assert budget_bytes(None, 4.5, None, 10**6) == (562_500, "4.5 bits per weight")
    assert budget_bytes(None, None, 0.3, 10**6) == (600_000, "0.3 of the bf16 size")
    for said in [(None, None, None), ("3MiB", 4.5, None), (None, 4.5, 0.3)]:
        with pytest.raises(UsageError, match="give the budget once"):
            budget_bytes(*said, 10**6)
    for value in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(UsageError, match="above zero"):
            budget_bytes(None, value, None, 10**6)


def test_human():
    assert (format_bytes(900), format_bytes(3 << 20), format_bytes(5 << 30)) == ("900 B", "3.00 MiB", "5.00 GiB")
