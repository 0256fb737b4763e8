"""Installed libraries compared with the requirements of a package, on packages that the tests write."""

import shlex
import sys
import tomllib
from importlib.metadata import PathDistribution, version
from pathlib import Path

import pytest

from advmoe.errors import UserError
from advmoe.installation import PURPOSES, Need, adding, extras, installed, needs

ROOT = Path(__file__).parents[1]
METADATA = """\
Metadata-Version: 2.4
Name: thing
Version: 1
Provides-Extra: new
Provides-Extra: elsewhere
Requires-Dist: numpy>=2
Requires-Dist: torch[opt]<2
Requires-Dist: no-such-library>=1
Requires-Dist: nor-this>=3,<4; extra == "new"
Requires-Dist: pillow; extra == "new"
Requires-Dist: only-there; sys_platform == "nowhere" and extra == "elsewhere"
"""


@pytest.fixture
def package(tmp_path):
    (tmp_path / "METADATA").write_text(METADATA)
    return PathDistribution(tmp_path)


def test_what_every_command_needs(package):
    assert needs(package) == [
        Need("numpy>=2", version("numpy")), Need("torch[opt]<2", version("torch")), Need("no-such-library>=1", None),
    ]  # fmt: skip
    assert [need.met for need in needs(package)] == [True, False, False]


def test_an_extra_has_only_its_own_requirements(package):
    assert [need.requirement for need in needs(package, "new")] == ["nor-this<4,>=3", "pillow"]


def test_a_requirement_of_another_system_is_ignored(package):
    assert extras(package) == ["elsewhere", "new"]
    assert needs(package, "elsewhere") == []


def test_a_development_version_meets_a_requirement():
    assert Need("thing>=2", "2.1.dev20260101+cpu").met
    assert not Need("thing>=2", "2.0rc1").met


def test_the_command_installs_what_is_missing_into_this_python(package):
    command = shlex.split(adding(package, [Need("nor-this<4,>=3", None), Need("torch[opt]<2", "3")]))
    assert command == [sys.executable, "-m", "pip", "install", "nor-this<4,>=3", "torch[opt]<2"]


def test_a_checkout_installs_its_own_versions(package, tmp_path):
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    (checkout / "constraints.txt").touch()
    origin = {True: '{"url": "%s", "dir_info": {"editable": true}}', False: '{"url": "%s", "dir_info": {}}'}
    for editable, options in ((True, ["-c", str(checkout / "constraints.txt")]), (False, [])):
        (tmp_path / "direct_url.json").write_text(origin[editable] % checkout.as_uri())
        assert shlex.split(adding(package, [Need("pillow", None)]))[4:] == [*options, "pillow"]


def test_files_without_an_installation_are_named(monkeypatch):
    monkeypatch.setattr("advmoe.installation.distribution", lambda name: PathDistribution.from_name("advmoe-is-not-installed"))
    with pytest.raises(UserError, match="without being installed"):
        installed()


def test_every_extra_has_a_purpose():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(PURPOSES) == set(project["optional-dependencies"]) | {"export"}
