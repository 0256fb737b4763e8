"""`advmoe completion`: the script for bash is run; those for zsh and fish are only read."""

import shutil
import subprocess

import pytest

from advmoe.cli.completion import HELP_TEXTS, script
from advmoe.cli.main import COMMANDS, main


@pytest.fixture(scope="module")
def bash_script():
    return script("bash")


def completed(text, *line):
    """The completions that bash offers for the last word of a line."""
    source = '\nCOMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _tyro_advmoe; printf "%s\\n" "${COMPREPLY[@]}"'
    bash = shutil.which("bash")
    assert bash
    process = subprocess.run([bash, "-c", text + source, "bash", *line], capture_output=True, text=True, check=True)
    return process.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        (["tra"], ["train"]),
        (["train", "--epo"], ["--epochs"]),
        (["train", "--precision", ""], ["float32", "bfloat16", "auto"]),
        (["data", "ge"], ["get"]),
        (["data", "get", "--fr"], ["--from"]),
        (["evaluate", "--save-a"], ["--save-adversarial"]),
    ],
)
def test_bash_completes(bash_script, line, completions):
    assert completed(bash_script, "advmoe", *line) == completions


def test_every_completion_is_one_word(bash_script):
    assert all(word.startswith("-") and " " not in word for word in completed(bash_script, "advmoe", "train", "--"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_no_line_break_in_its_help(shell):
    (line,) = [line for line in script(shell).splitlines() if line.startswith(HELP_TEXTS)]
    assert all(f"'{name}': {{'description': '{name}'" in line for name in COMMANDS)
    assert r"\n" not in line


def test_an_unknown_shell_is_refused(capsys):
    assert main(["completion", "tcsh"]) == 2
    message = capsys.readouterr().err
    assert "bash" in message
    assert message.count("\n") == 1
