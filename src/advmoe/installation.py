"""What is installed beside what the package asks for, and the command that adds the rest."""

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

from packaging.requirements import Requirement

from advmoe.errors import UserError

PURPOSES = {
    "autoattack": "AutoAttack: evaluate --standard and --full",
    "hub": "the Hugging Face hub: networks from and to it, data get --from hub",
    "export": "ONNX files, checked and run",
    "tensorboard": "train --track tensorboard",
    "wandb": "train --track wandb",
    "ray": "sweep --placement ray",
    "slurm": "sweep --placement slurm",
    "browser": "the report's tests in a browser",
    "dev": "tests, lint and types: make test, make lint, make types",
    "docs": "the pages as a site: make docs",
}


@dataclass(frozen=True)
class Need:
    """A library that is asked for: the requirement as pip takes it, and the version that is installed, if any."""

    requirement: str
    found: str | None

    @property
    def name(self) -> str:
        """Of the library."""
        return Requirement(self.requirement).name

    @property
    def met(self) -> bool:
        """Whether it is installed in a version that will do."""
        return self.found is not None and Requirement(self.requirement).specifier.contains(self.found, prereleases=True)


def installed() -> Distribution:
    """The installed package. Raises UserError where Python finds its files, but no installation of it."""
    try:
        return distribution("advmoe")
    except PackageNotFoundError:
        raise UserError(f"advmoe runs from {Path(__file__).parents[1]} without being installed: pip install it first") from None


def extras(package: Distribution) -> list[str]:
    """The extras' names, sorted."""
    return sorted(package.metadata.get_all("Provides-Extra") or [])


def needs(package: Distribution, extra: str = "") -> list[Need]:
    """The libraries that the package asks for on this machine, or those that one of its extras adds."""
    asked = [Requirement(text) for text in package.requires or []]
    return [_need(requirement) for requirement in asked if _applies(requirement, extra)]


def _applies(requirement: Requirement, extra: str) -> bool:
    def holds(name: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": name})

    return holds(extra) and not (extra and holds(""))


def _need(requirement: Requirement) -> Need:
    parts = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    try:
        found = distribution(requirement.name).version
    except PackageNotFoundError:
        found = None
    return Need(f"{requirement.name}{parts}{requirement.specifier}", found)


def adding(package: Distribution, missing: Iterable[Need]) -> str:
    """The shell command that installs what is missing into this Python; in a checkout, in the versions that its tests pass with."""
    checkout = _checkout(package)
    pins = checkout / "constraints.txt" if checkout else None
    options = ["-c", str(pins)] if pins is not None and pins.is_file() else []
    return shlex.join([sys.executable, "-m", "pip", "install", *options, *(need.requirement for need in missing)])


def _checkout(package: Distribution) -> Path | None:
    """The source folder of an editable installation (PEP 610)."""
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    editable = origin.get("dir_info", {}).get("editable", False)
    return Path(unquote(urlparse(origin["url"]).path)) if editable else None
