"""Rows that tests report, from all worker processes, in the JSON file of a make target."""

import os
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from advmoe.files import write_json
from advmoe.provenance import code

Row = dict[str, Any]
WHOLE = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)  # the tests came to their end


class RowReport:
    """A plugin for `make test-NAME`, whose tests append ("NAME", row) to their item's `user_properties`.

    `content(rows)` is written to the file that the environment variable NAME_REPORT names, unless the tests were interrupted.
    """

    def __init__(self, name: str, content: Callable[[list[Row]], Row]) -> None:
        self.name, self.content, self.rows = name, content, list[Row]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.rows += [row for name, row in report.user_properties if name == self.name]

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        path, worker = os.environ.get(f"{self.name.upper()}_REPORT"), hasattr(session.config, "workerinput")
        if self.rows and path and exitstatus in WHOLE and not worker:
            write_json(Path(path), {"command": f"make test-{self.name}", **code(), **self.content(self.rows)}, indent=1)


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Those of Python and the libraries."""
    return {"python": platform.python_version()} | {name: version(name) for name in libraries}
