"""`make test-faults`: runs are killed, disks fill up, servers misbehave, inputs mean harm. Counts are printed at the end."""

import pytest

from harness import SHORT, TALLY, uninterrupted


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "The whole run, uninterrupted."
    return uninterrupted(tmp_path_factory)


@pytest.fixture(scope="session")
def short(tmp_path_factory):
    "One arm, one iteration: every stage once."
    return uninterrupted(tmp_path_factory, *SHORT)


@pytest.fixture
def fault():
    "Counts a fault as tried, and as survived when the test gets to its end."
    TALLY["faults tried"] += 1
    yield
    TALLY["faults"] += 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and "fault" in item.fixturenames:
        TALLY["faults"] -= not report.passed  # its fixture ends well all the same
        TALLY["faults tried"] -= report.skipped
    return report


def pytest_terminal_summary(terminalreporter):
    t, write = TALLY, terminalreporter.write_line
    write("")
    for name in ("tiny", "smol"):
        if t[f"{name} tried"]:
            write(
                f"interruptions of {name} survived: {t[f'{name} survived']} of {t[f'{name} tried']} ({', '.join(f'{n} while {k[1]}' for k, n in sorted(t.items(), key=str) if isinstance(k, tuple) and k[0] == name)})"
            )
    if t["faults tried"]:
        write(f"faults survived: {t['faults']} of {t['faults tried']}")
    for dtype in ("float32", "bfloat16"):
        if found := {k[2]: n for k, n in t.items() if isinstance(k, tuple) and k[0] == "differ" and k[1] == dtype}:
            write(
                f"of 32 responses in {dtype}, other ones with {', '.join(f'{name}: {n}' for name, n in found.items())}"
            )
    write(
        f"inputs tried: {t['inputs']} ({t['refused']} refused in one line, {t['dropped']} of their rows dropped and counted)"
    )
    write(f"rows lost: {t['rows lost']}")
