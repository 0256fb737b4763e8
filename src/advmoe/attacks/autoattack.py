"""AutoAttack (Croce & Hein 2020), run by the package that contains the official code."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks.draws import derive_seed
from advmoe.attacks.job import Job, Setting
from advmoe.errors import UserError

STANDARD = ("aa_apgd-ce", "aa_apgd-t", "aa_fab-t", "aa_square")
PLUS = tuple(f"aaplus_{part}" for part in ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"))
RAND = tuple(f"aarand_{part}" for part in ("apgd-ce", "apgd-dlr"))
VERSIONS = {"aa": "standard", "aaplus": "plus", "aarand": "rand"}
SUBSTITUTES = {  # attacks of this package, whose losses have a form for two and three classes
    "aa_apgd-t": "apgd_t", "aaplus_apgd-dlr": "apgd_dlr_plus", "aaplus_apgd-t": "apgd_t_plus",
}  # fmt: skip
LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # the official DLR losses need this many logits


def require() -> Any:
    """The package's class. Raises UserError if the extra `autoattack` is not installed."""
    try:
        from pyautoattack import AutoAttack  # noqa: PLC0415
    except ImportError:
        raise UserError("AutoAttack needs the extra autoattack: pip install 'advmoe[autoattack]'") from None
    return AutoAttack


def substitutes(names: Iterable[str], num_classes: int) -> dict[str, str]:
    """The attacks of `names` that need more than `num_classes` classes and have a substitute -> that substitute."""
    return {
        name: SUBSTITUTES[name] for name in names
        if name in SUBSTITUTES and num_classes < LEAST_CLASSES[name.split("_")[1]]
    }  # fmt: skip


def standard(num_classes: int) -> tuple[str, ...]:
    """The attacks of standard AutoAttack. With two or three classes one of them is replaced by its substitute."""
    replaced = substitutes(STANDARD, num_classes)
    return tuple(replaced.get(name, name) for name in STANDARD)


def run_part(job: Job, name: str) -> Tensor:
    """Run one attack of STANDARD, PLUS or RAND. Returns x' [B, C, H, W]."""
    version, part = name.split("_")
    with torch.random.fork_rng(devices=[job.x.device] if job.x.is_cuda else []):
        suite = require()(
            job.predict, norm=job.norm, eps=job.epsilon, version=VERSIONS[version], device=job.x.device,
            seed=derive_seed(job.seed, job.shard) % 2**31,
        )  # fmt: skip
        suite.verbose = False
        suite.attacks_to_run = [part]
        suite.apgd_targeted.n_target_classes = min(suite.apgd_targeted.n_target_classes, job.num_classes - 1)
        suite.fab.n_target_classes = min(suite.fab.n_target_classes, job.num_classes - 1)
        x_adv: Tensor = suite.run_standard_evaluation(job.x, job.y, batch_size=len(job.x))[0]
    return x_adv.detach()


def square_obstacle(setting: Setting) -> str:
    """Why the official Square attack cannot start on images of this size; empty if it can.

    In L2 it starts by tiling the image with squares of side H // 5. It counts them for the full image, but places the first one
    after a margin. It fails if a square crosses the edge of the image.
    """
    _, height, width = setting.shape
    side = height // 5
    margin = (height - 5 * side) // 2
    fits = side == 1 or (side > 1 and all(margin + length // side * side <= length for length in (height, width)))
    if setting.norm != "L2" or fits:
        return ""
    return f"the official Square cannot start in L2 on images of {height} x {width} pixels"
