"""The commit of the code that a process runs."""

import subprocess

import pytest

from advmoe import provenance


def test_the_commit_is_that_of_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    provenance._commit.cache_clear()
    first = provenance.code()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asks git again"))
    assert provenance.code() == first
    assert provenance.provenance().commit == first.get("commit")
