"""The arguments of `advmoe evaluate`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from advmoe.cli.parsing import Flag, parse
from advmoe.config import ComputeConfig, Fraction
from advmoe.config.choices import BATCH_SIZE, PATHWAY_BUDGET, SHARD_SIZE, Norm
from advmoe.errors import UserError, check_count, short_repr

COSTS = {  # of the presets; the tests count them (tests/budget.py). No comma in a number: help ends lines after commas
    "quick": "at most 50 PGD passes an image; at most 121 APGD and 157 route-aware passes on survivors",
    "standard": "at most 50 PGD and 3905 AutoAttack passes an image; "
    "at most 282 APGD, 1813 route-aware and 68 transfer passes on survivors; all self-checks",
    "full": "at most 50 PGD, 3905 AutoAttack and 5525 AutoAttack plus passes an image; "
    "at most 704 PGD, 1438 APGD, 5776 route-aware and 68 transfer passes on survivors; all self-checks",
}


def _costs(preset: str, what: str) -> Any:
    """Help of a preset's flag, with its budget."""
    return tyro.conf.arg(help=f"{what}. Costs {COSTS[preset]}.")


@dataclass(frozen=True)
class EvaluateArguments:
    """Attack a trained network on the test set, and write the result to RUN/record.json; for a file NAME.safetensors, to
    NAME.record.json beside it.

    Costs are in passes, forward and backward. Survivors are the images that AutoAttack and all later attacks so far did not break;
    without AutoAttack, the attacks of all figures take its place. A network that routes costs more: 50 PGD passes for wrongly
    classified images too, and for each expert 10 PGD passes an image and at most 79 APGD passes on those that these leave.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of a run, a file written by advmoe.save_file, a network of the package (advmoe models), or a name on the hub
    (owner/name)."""
    quick: Annotated[
        Flag,
        _costs("quick", "PGD, APGD on the margin and a short attack on the routing; used if you name no preset and no attacks"),
    ] = False
    standard: Annotated[Flag, _costs("standard", "AutoAttack, margin and route-aware attacks, pathways, all self-checks")] = False
    full: Annotated[Flag, _costs("full", "Those of --standard, with a wider rerouting search, and many more")] = False
    attacks: tuple[str, ...] = ()
    """Instead of a preset: names of attacks, such as pgd_50 and reroute. autoattack, autoattack_plus and autoattack_rand stand for
    all their attacks."""
    norm: Norm = "Linf"
    """Norm of the ball."""
    epsilon: Fraction | None = None
    """Radius of the ball, such as 8/255; by default the one that the network was trained for. L2 has no default."""
    transfer: Path | None = None
    """Another run on the same data, such as that of the small dense network: images that fool it are tried on this network."""
    control: Path | None = None
    """An evaluated run to compare with on the same images, usually AT (MoE) with one expert (recipe DATASET-BACKBONE-at_moe-n1):
    the same network without a choice."""
    data_dir: str | None = None
    """File or folder of the data, if it is no longer where it was during training."""
    test_set: Path | None = None
    """Instead of the data's test set: CIFAR-10.1 (NAME_data.npy beside NAME_labels.npy), CIFAR-10-C (its folder, with --corruption
    and --severity), an .npz with images and labels, or CLASS/ folders of images. The Record is RUN/NAME.record.json."""
    corruption: str | None = None
    """Name of a corruption in the folder of --test-set, which has CORRUPTION.npy and labels.npy, or CORRUPTION/SEVERITY/CLASS/."""
    severity: int | None = None
    """Severity of the corruption, 1 to 5."""
    limit_test: int | None = None
    """Attack this many test images, balanced over the classes."""
    name: str | None = None
    """Keep this evaluation beside others of the run: its Record is RUN/NAME.record.json, its results are in RUN/evaluation-NAME.
    With --test-set, NAME replaces the test set's name there."""
    seed: int = 0
    """Seed of the attacks' random draws."""
    shard_size: int = SHARD_SIZE
    """Images of one shard. The results of a shard are one file, which is written after every attack."""
    batch_size: int = BATCH_SIZE
    """At most this many images are attacked at once."""
    pathway_budget: int = PATHWAY_BUDGET
    """A pathway is a choice of one expert in each layer. All are attacked if there are at most this many, otherwise a sample of
    them (RA-paths, sampled). 0 skips this. The costs of the presets are for at most 8 pathways; each further one that is attacked
    adds at most 105 passes."""
    processes: int = 1
    """Divide the shards among this many processes (and the CUDA devices, if there are several)."""
    part: tuple[int, int] | None = None
    """Two numbers i k: run only every k-th shard, starting at shard i (from 0). The same command without --part then collects the
    results of all parts."""
    fresh: Flag = False
    """Delete earlier results in RUN/evaluation; with --name or --test-set in RUN/evaluation-NAME."""
    save_adversarial: Flag = False
    """Write the adversarial images to RUN/evaluation/adversarial."""
    keep_images: Flag = False
    """Store the test images of the report's gallery in RUN/record.json, the file to publish. Without this flag they are written to
    RUN/gallery.json, for reports on this machine."""
    robustbench: Path | None = None
    """Also write a RobustBench model_info file, to this path."""
    json: Flag = False
    """Print the Record as JSON."""
    runtime: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        for name in ("limit_test", "shard_size", "batch_size", "processes"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)
        if self.name is not None and not re.fullmatch(r"\w[\w.+-]{0,99}", self.name):
            raise UserError(f"name must be up to 100 letters, digits and . _ + - (not as the first), not {short_repr(self.name)}")
        if self.pathway_budget < 0:
            raise UserError(f"pathway_budget must be at least 0, not {self.pathway_budget}")
        if self.quick + self.standard + self.full + bool(self.attacks) > 1:
            raise UserError("--quick, --standard, --full and --attacks exclude each other")
        if self.part is not None and not 0 <= self.part[0] < self.part[1]:
            raise UserError(f"part must be i k with 0 <= i < k, not {self.part[0]} {self.part[1]}")
        if self.part is not None and (self.processes > 1 or self.fresh):
            raise UserError("--part excludes --processes, and --fresh, which would delete the results of other parts")
        corruption, severity = self.corruption, self.severity
        has_corruption, has_severity, has_test_set = (value is not None for value in (corruption, severity, self.test_set))
        for is_wrong, message in (
            (has_corruption != has_severity, "--corruption and --severity go together"),
            ("/" in (corruption or ""), f"--corruption {corruption}: must be a name without folders; --severity has the severity"),
            (has_corruption and not has_test_set, "--corruption needs --test-set: the folder of the corruptions"),
            (has_test_set and self.data_dir is not None, "--test-set and --data-dir exclude each other"),
        ):
            if is_wrong:
                raise UserError(message)
        if self.norm == "L2" and self.epsilon is None:
            raise UserError("--norm L2 needs --epsilon (0.5 is usual for 32x32 images)")

    @property
    def preset(self) -> str | tuple[str, ...]:
        """What to run: a preset's name or attacks."""
        return self.attacks or ("standard" if self.standard else "full" if self.full else "quick")


@dataclass(frozen=True)
class EvaluateCommand(EvaluateArguments):
    """The arguments, and the command line they come from, which is passed to worker processes."""

    argv: tuple[str, ...] = ()


def read(argv: list[str]) -> EvaluateCommand:
    return EvaluateCommand(**vars(parse(EvaluateArguments, "evaluate", argv)), argv=tuple(argv))
