"""Tests of optional features: @pytest.mark.extras("plotly", "chromium") names what a test needs.

These are packages of requirements-extras.txt, or the browser. Without them the test is skipped.
With them and with REQUIRE_EXTRAS=1 in the environment, a skipped test fails.
"""

import importlib.util
import os
import shutil

import pytest


def find_chromium():
    """Its path, or None."""
    return shutil.which("chromium") or shutil.which("google-chrome")


def is_installed(name):
    if name == "chromium":
        return bool(find_chromium())
    return importlib.util.find_spec(name) is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    marker = item.get_closest_marker("extras")
    required = marker and os.environ.get("REQUIRE_EXTRAS") == "1"
    if report.skipped and required and all(map(is_installed, marker.args)):
        reason = report.longrepr[-1]
        report.outcome = "failed"
        report.longrepr = f"skipped although {', '.join(marker.args)} can be used: {reason}"
    return report
