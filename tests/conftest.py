"""Nothing is skipped in silence: under CI=true, where everything can be had, a skip is a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.hookimpl(wrapper=True)  # before anybody counts
def pytest_runtest_logreport(report: pytest.TestReport | pytest.CollectReport) -> Iterator[None]:
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped, which is a failure under CI=true: {report.longrepr}"
    yield


pytest_collectreport = pytest_runtest_logreport  # a whole file may be skipped
