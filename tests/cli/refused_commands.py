"""Commands that are refused."""

from typing import Any

import pytest

from advmoe.cli.main import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line that a refused command prints; its status is 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("advmoe: error: "), captured.err
    assert captured.err.count("\n") == 1, captured.err
    return captured.err
