"""Compare the installed libraries with those that the package requires, and build the command that adds the missing ones."""

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
    "hub": "the Hugging Face hub: download and publish networks, data get --from hub",
    "export": "ONNX files, checked and run",
    "tensorboard": "train --track tensorboard",
    "wandb": "train --track wandb",
    "ray": "sweep --placement ray",
    "slurm": "sweep --placement slurm",
    "browser": "the report's tests in a browser",
    "dev": "tests, lint and type checks: make test, make lint, make types",
    "docs": "the documentation as a website: make docs",
}


@dataclass(frozen=True)
class Need:
    """A required library: the requirement in pip's syntax, and `version`, the installed one or None."""

    requirement: str
    version: str | None

    @property
    def name(self) -> str:
        """The name of the library."""
        return Requirement(self.requirement).name

    @property
    def met(self) -> bool:
        """Whether a version is installed that meets the requirement."""
        return self.version is not None and Requirement(self.requirement).specifier.contains(self.version, prereleases=True)


def installed() -> Distribution:
    """The metadata of the installed package. Raises UserError if it runs from its files without being installed."""
    try:
        return distribution("advmoe")
    except PackageNotFoundError:
        raise UserError(f"advmoe runs from {Path(__file__).parents[1]} without being installed: pip install it first") from None


def extras(package: Distribution) -> list[str]:
    """The names of the extras, sorted."""
    return sorted(package.metadata.get_all("Provides-Extra") or [])


def needs(package: Distribution, extra: str = "") -> list[Need]:
    """The libraries that the package requires on this machine, or those that `extra` adds."""
    requirements = [Requirement(text) for text in package.requires or []]
    return [_need(requirement) for requirement in requirements if _applies(requirement, extra)]


def _applies(requirement: Requirement, extra: str) -> bool:
    def holds(name: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": name})

    return holds(extra) and not (extra and holds(""))


def _need(requirement: Requirement) -> Need:
    parts = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    try:
        version = distribution(requirement.name).version
    except PackageNotFoundError:
        version = None
    return Need(f"{requirement.name}{parts}{requirement.specifier}", version)


def adding(package: Distribution, missing: Iterable[Need]) -> str:
    """The shell command that installs `missing` into this Python. In a checkout it uses the tested versions (constraints.txt)."""
    checkout = _checkout(package)
    pins = checkout / "constraints.txt" if checkout else None
    options = ["-c", str(pins)] if pins is not None and pins.is_file() else []
    return shlex.join([sys.executable, "-m", "pip", "install", *options, *(need.requirement for need in missing)])


def _checkout(package: Distribution) -> Path | None:
    """The source folder of an editable installation (PEP 610), or None."""
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    editable = origin.get("dir_info", {}).get("editable", False)
    return Path(unquote(urlparse(origin["url"]).path)) if editable else None
