"""A pytest plugin: writes how each test ended, one JSON line a phase, into the file that KVORTEX_VERDICTS names."""

import json
import os

import pytest


def is_assertion(error):
    """Tell whether a failed test said "this is wrong", rather than broke down on its way there."""
    if isinstance(error, BaseExceptionGroup):
        return any(is_assertion(inner) for inner in error.exceptions)
    return isinstance(error, AssertionError | pytest.fail.Exception)


def write(**line):
    with open(os.environ["KVORTEX_VERDICTS"], "a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    write(test=item.nodeid, phase="start")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    error = call.excinfo.value if call.excinfo else None
    write(
        test=item.nodeid,
        phase=report.when,
        outcome=report.outcome,
        assertion=error is not None and is_assertion(error),
        error=f"{type(error).__name__}: {error}"[:300] if error else "",
    )
