"""The arguments of `advmoe attack`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from advmoe.cli.parsing import DeviceOptions, Flag
from advmoe.config import Fraction
from advmoe.errors import UserError
from advmoe.files import check_target


@dataclass(frozen=True)
class AttackArguments:
    """Search for the smallest change that fools a network on one image. Prints which of PGD, APGD and rerouting fools it first, and
    writes the adversarial image."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, a file written by advmoe.save_file, a network of the package (advmoe models), or a name on the hub
    (owner/name)."""
    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """The image's file."""
    epsilon: Fraction | None = None
    """Radius of the L-infinity ball, such as 8/255; by default the one that the network was trained for."""
    label: str | None = None
    """Name of the image's true class; by default the predicted one."""
    out: Path | None = None
    """File for the image with the smallest change that was found, .png or .npy; by default IMAGE-adversarial.png in the working
    folder. If no image in the 8 bits of a PNG fools the network, an .npy of that name is written."""
    seed: int = 0
    """Seed of the attacks' random draws."""
    json: Flag = False
    """Print JSON."""
    runtime: DeviceOptions = field(default_factory=DeviceOptions)

    def __post_init__(self) -> None:
        if self.epsilon is not None and not 0 < self.epsilon <= 1:
            raise UserError(f"epsilon must be in (0, 1], not {self.epsilon}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be in [0, 2**63), not {self.seed}")
        if self.path.suffix.lower() not in (".png", ".npy"):
            raise UserError(f"{self.path}: the adversarial image is written without loss: give a name that ends in .png or .npy")
        for path in (self.path, self.path.with_suffix(".npy")):
            check_target(path, "the adversarial image", self.image, Path(self.run))

    @property
    def path(self) -> Path:
        """Path of the adversarial image."""
        return self.out or Path(f"{self.image.stem}-adversarial.png")
