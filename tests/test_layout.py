"""No measure of the layout gets worse, and what is measured is what it is called."""

import pytest

import layout


def test_no_limit_is_passed(capsys):
    assert layout.main() == 0, capsys.readouterr().out


@pytest.mark.parametrize("name, change", [("lines", 1), (layout.AT_LEAST, -0.01)])
def test_a_passed_limit_is_named(name, change):
    assert layout.passed(layout.LIMITS) == []
    (said,) = layout.passed(layout.LIMITS | {name: layout.LIMITS[name] + change})
    assert said.startswith(f"layout: {name}: ") and said.endswith(f"limit is {layout.LIMITS[name]}")


def test_a_circle_is_found_however_it_is_imported():
    made = {
        "a": "from scir.b import c",
        "b.c": "def f():\n    from . import d",
        "b.d": "from ..a import x",
        "e": "import scir.a",
    }
    assert layout.cycles(made) == ["a, b.c, b.d"] and layout.cycles(made | {"b.d": "import os"}) == []


def test_two_definitions_are_two_meanings_unless_one_is_a_command():
    made = {"a": "def f(): pass\ndef run(): pass", "b": "class f: pass\ndef run(): pass\ndef _g(): pass"}
    assert layout.repeated(made) == ["f (a, b)"]
    assert layout.repeated({"a": "def f(): pass", "cli": "@app.command()\ndef f(): pass"}) == []


def test_lines_by_hand():
    source = "def f():\n" + "    x = 1\n" * 25 + "y = '" + "z" * 120 + "'\n"
    assert layout.counts([source]) == dict(zip(layout.LIMITS, (27, 1, 3.7, 9, 1)))
