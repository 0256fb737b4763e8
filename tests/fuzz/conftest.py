"""The results of `make test-fuzz` go to the file that FUZZ_REPORT names."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from advmoe.files import write_json

LIBRARIES = ("hypothesis", "numpy", "pyyaml", "pyarrow", "pillow", "safetensors", "torch")
ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.pluginmanager.register(_Collector(config), "fuzz-report")


class _Collector:
    """Collects test results from all worker processes."""

    def __init__(self, config: pytest.Config) -> None:
        self.rows = config.stash[ROWS]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.rows += [row for name, row in report.user_properties if name == "fuzz"]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):  # interrupted: the results are not complete
        return
    rows, report_path = session.config.stash[ROWS], os.environ.get("FUZZ_REPORT")
    if rows and report_path and not hasattr(session.config, "workerinput"):
        versions = {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
        content = {"command": "make test-fuzz", "versions": versions, "readers": sorted(rows, key=lambda row: row["reader"])}
        write_json(Path(report_path), content, indent=1)
