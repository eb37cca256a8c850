"""How values are put into words."""

from __future__ import annotations

import pytest

from caregrid.domain.states import TABLES
from caregrid.web import _words


@pytest.mark.parametrize("thing", TABLES)
def test_every_state_has_words(thing):
    assert set(_words.STATES[thing]) == set(TABLES[thing])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Okafor^Clare^Ada^Dr", "OKAFOR, Clare Ada (Dr)"),
        ("Smith", "SMITH"),
        ("^Ada", "Ada"),
        ("", "Name not given"),
        ("^^^Dr", "Name not given"),
        ("Yamada^Tarou=山田^太郎=やまだ^たろう", "YAMADA, Tarou"),
    ],
)
def test_names(name, shown):
    assert _words.person(name) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (5303.75, "5,303.75"), (-812.0, "−812"), (0.0, "0"), (0.001234, "0.0012"), (-0.004, "−0.004"), (12.5, "12.5")],
)
def test_numbers(value, shown):
    assert _words.number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "–"),
        (0.04, "less than 0.1 seconds"),
        (3.26, "3.3 seconds"),
        (59, "59 seconds"),
        (60, "1 minute"),
        (7300, "2 hours"),
        (172800, "2 days"),
    ],
)
def test_durations(seconds, shown):
    assert _words.duration(seconds) == shown


def test_ages():
    assert _words.age("19400412", "20261120") == "86 years"
    assert _words.age("20261020", "20261120") == "1 month"
    assert _words.age("", "") == ""
    assert _words.age("1940", "") == ""


def test_recorded_values():
    assert [_words.said(one) for one in (None, [], ["a", "b"], True, 3, "x")] == ["–", "none", "a, b", "yes", "3", "x"]
