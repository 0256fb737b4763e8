"""The arguments of `advmoe models`."""

from dataclasses import dataclass

from advmoe.cli.parsing import Flag


@dataclass(frozen=True)
class ModelsArguments:
    """List the networks that come with the package: data, cost and robustness, from their Records."""

    json: Flag = False
    """Print JSON."""
