"""`python -m advmoe`: its output, and its interrupts."""

import io
import logging
import signal
import subprocess
import sys
import time

import pytest
import torch

from advmoe.cli.main import main


@pytest.mark.parametrize(
    ("encoding", "output"), [("ascii", r"na\xefve \u20ac"), ("latin-1", "naïve \\u20ac"), ("utf-8", "naïve €")]
)
def test_characters_that_the_output_cannot_hold_are_escaped(encoding, output, monkeypatch):
    """As with PYTHONIOENCODING, on both streams."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert main(["predict", "naïve €"]) == 2
    print("naïve €")
    monkeypatch.undo()
    assert streams["stderr"].buffer.getvalue().decode(encoding).startswith("advmoe: error: ")
    assert streams["stdout"].buffer.getvalue().decode(encoding) == output + "\n"


def test_a_killed_worker_and_a_lack_of_memory_are_one_line_and_another_runtime_error_is_not(monkeypatch, capsys):
    def killed(arguments):
        raise RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed. ")

    monkeypatch.setattr("advmoe.cli.recipes.run", killed)
    assert main(["recipes"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("advmoe: error: a process that decodes images was killed, perhaps because memory ran out")
    assert message.count("\n") == 1

    def too_wide(arguments):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("advmoe.cli.recipes.run", too_wide)
    assert main(["recipes"]) == 2
    assert capsys.readouterr().err.startswith("advmoe: error: out of memory: use a smaller --batch-size")

    def broken(arguments):
        raise RuntimeError("ours")

    monkeypatch.setattr("advmoe.cli.recipes.run", broken)
    with pytest.raises(RuntimeError, match="ours"):
        main(["recipes"])


def test_a_warning_is_one_line_on_stderr_in_every_call(monkeypatch, capsys):
    monkeypatch.setattr(
        "advmoe.cli.recipes.run", lambda arguments: logging.getLogger("advmoe").warning("%s: odd\nname", "a\x1b[2Jb")
    )
    handlers = list(logging.getLogger("advmoe").handlers)
    for _ in range(2):
        assert main(["recipes"]) == 0
        assert capsys.readouterr() == ("", "warning: a\\x1b[2Jb: odd name\n")
    assert logging.getLogger("advmoe").handlers == handlers


# A command line that needs 0.3 s to clean up after an interrupt, and another 0.3 s when the interpreter ends.
STAND_IN = """
import atexit, sys, time, types

def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("closing", flush=True)
        time.sleep(0.3)
        return 130

atexit.register(lambda: (print("leaving", flush=True), time.sleep(0.3)))
sys.modules["advmoe.cli.main"] = types.SimpleNamespace(main=main)
from advmoe.__main__ import run
run()
"""


@pytest.mark.parametrize("moments", [("ready",), ("ready", "closing", "leaving")])
def test_the_first_interrupt_ends_the_command_and_later_ones_change_nothing(moments):
    process = subprocess.Popen([sys.executable, "-c", STAND_IN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = []
    for line in process.stdout:
        seen.append(line.strip())
        if seen[-1] in moments:
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert seen == ["ready", "closing", "leaving"]
    assert process.stderr.read() == ""


def test_ignored_interrupts_stay_ignored():
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + STAND_IN.replace("60", "0.3")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == "leaving\n"


def test_without_a_command_the_commands_are_listed(capsys):
    assert main([]) == 0
    assert "advmoe demo" in capsys.readouterr().out
