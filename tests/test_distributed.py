"""What a process knows of the torchrun that started it."""

import os

import pytest

from advmoe import distributed
from advmoe.data import stream


def test_two_launches_with_fixed_ports_have_different_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert distributed.launch_id() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a1b2")
    assert distributed.launch_id() == "a1b2"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun with --master-port
    first = distributed.launch_id()
    assert first == distributed.launch_id()
    monkeypatch.setattr(os, "getppid", lambda: 12)
    assert distributed.launch_id() != first
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")  # a restart may give rank 0 to another machine
    assert distributed.launch_id() == "none"


def test_ranks_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "cores", lambda: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert stream.default_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert stream.default_workers() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert stream.default_workers() == 1
