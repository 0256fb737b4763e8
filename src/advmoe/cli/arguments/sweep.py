"""The arguments of `advmoe sweep`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Annotated

import tyro

from advmoe.cli.parsing import Flag
from advmoe.config import RuntimeConfig
from advmoe.config.choices import MAX_SEEDS, PlacementName
from advmoe.errors import UserError, check_count
from advmoe.files import check_target


@dataclass(frozen=True)
class SweepArguments:
    """Train and evaluate every run of one of the paper's tables or figures, or of a sweep file.

    After a stop or a kill, the same command continues where it was. With --minutes it ends with status 75 while work remains, and
    can be called again.
    """

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WHAT")]
    """a1, a2, fig7, figA2, or a sweep file (FILE.yaml; docs/paper.md describes its fields)."""
    out: Path
    """Folder for the runs: one folder each, NAME-sSEED."""
    minutes: float | None = None
    """End within this many minutes, with status 75 if work remains."""
    records: Path | None = None
    """At the end, write the Records of the runs that are done to this JSON file, without the galleries' test images."""
    keep_images: Flag = False
    """Include the galleries' test images in the file of --records."""
    seeds: int | None = None
    """Runs of each combination of settings, with seeds from 0; by default as in the sweep file, or 3."""
    dry_run: Flag = False
    """Print the plan and write nothing."""
    only: tuple[str, ...] = ()
    """Only the runs whose name contains all of these texts (resnet18, advmoe, r0.5, s0); s1 is seed 1, not 10."""
    epochs: int | None = None
    """Epochs per phase, instead of the recipes'."""
    limit_train: int | None = None
    """Train on this many images, balanced over the classes."""
    limit_test: int | None = None
    """Attack this many test images, balanced over the classes."""
    dataset: str | None = None
    """Data set, instead of that of the sweep."""
    width: int | None = None
    """Channels of the dense networks' first stage."""
    batch_size: int | None = None
    """Images per batch."""
    data_dir: str | None = None
    """File or folder that holds the data."""
    preset: tuple[str, ...] = ()
    """What the evaluations run: a preset (quick, standard or full), or names of attacks instead. By default the sweep file's, or
    quick."""
    placement: PlacementName = "local"
    """Execute runs as processes on this machine, tasks of a Ray cluster, or jobs of Slurm (extras ray and slurm)."""
    workers: int | None = None
    """Number of runs at once; by default one for each CUDA device, or up to four on the CPU (Slurm: no limit)."""
    address: str | None = None
    """Ray: address of a running cluster, or auto. Slurm: submitit's executor; local and debug work without Slurm."""
    slurm: tuple[str, ...] = ()
    """Slurm: submitit's parameters as KEY=VALUE (slurm_partition=gpu gpus_per_node=1 timeout_min=600). A value in JSON is read as
    such, any other is text."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        for name in ("seeds", "workers"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)
        if self.seeds is not None and self.seeds > MAX_SEEDS:
            raise UserError(f"seeds must be at most {MAX_SEEDS}, not {self.seeds}")
        if self.minutes is not None and not 0 < self.minutes < inf:
            raise UserError(f"minutes must be positive and finite, not {self.minutes}")
        if self.address is not None and self.placement == "local":
            raise UserError("--address is for --placement ray or slurm")
        if self.slurm and self.placement != "slurm":
            raise UserError("--slurm is for --placement slurm")
        if self.keep_images and self.records is None:
            raise UserError("--keep-images is for the file of --records")
        if self.records is not None:
            check_target(self.records, "the Records")

    @property
    def settings(self) -> Mapping[str, Mapping[str, int | str]]:
        """The settings of every run that flags change."""
        values: dict[str, dict[str, int | str | None]] = {
            "training": {"epochs": self.epochs, "batch_size": self.batch_size},
            "model": {"width": self.width},
            "data": {"limit_train": self.limit_train, "limit_test": self.limit_test, "data_dir": self.data_dir},
        }
        return {section: {name: v for name, v in fields.items() if v is not None} for section, fields in values.items()}
