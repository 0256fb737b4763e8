"""The results of `make test-fuzz` go to the file that FUZZ_REPORT names."""

import pytest
from row_report import Row, RowReport, versions

LIBRARIES = ("hypothesis", "numpy", "pyyaml", "pyarrow", "pillow", "safetensors", "torch")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RowReport("fuzz", content))


def content(rows: list[Row]) -> Row:
    return {"versions": versions(LIBRARIES), "readers": sorted(rows, key=lambda row: row["reader"])}
