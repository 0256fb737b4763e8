"""A Record: what a network withstands and costs, with what made it."""

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch

import advmoe
from advmoe import migrations
from advmoe.attacks import Norm
from advmoe.config import RunConfig, to_dict
from advmoe.data import Splits
from advmoe.errors import UserError
from advmoe.evaluation.cost import Cost, cost
from advmoe.evaluation.record_rules import DEEPEST, fault, garbled_parts, is_readable, shown
from advmoe.evaluation.results import Evaluation
from advmoe.evaluation.runner import evaluate_with
from advmoe.evaluation.snapshot import snapshot
from advmoe.evaluation.target import EvaluationOptions
from advmoe.files import bounded_text
from advmoe.models import Classifier

SCHEMA = 3  # 2 said "picture" where 3 says "image"
MAX_BYTES = 2**26  # of a file of Records: the largest of ours has 350 thousand
HISTORY = ("epoch", "phase", "val_sa", "val_ra", "loss", "router_loss", "lr", "load")
LISTS = ("history", "classes", "layers", "gallery")  # added by schema 2, as are
NULLABLE = ("run", "load_by_class", "epsilon_curve")


def make_record(
    config: RunConfig, splits: Splits, evaluation: Evaluation, *, run: str, epoch: int, history: Sequence[Mapping[str, Any]],
    network: Cost, dense: Cost, shown: Mapping[str, Any], evaluate_seconds: float, attack_seed: int, epsilon: float, norm: Norm,
) -> dict[str, Any]:  # fmt: skip
    """One JSON-ready dict. Accuracies in percent of `test_images`; `ra` by PGD steps; `gmacs` are the ideal ones.

    `ra_worst` stands only where AutoAttack and the attacks on routing were run, `ra_worst_quick` otherwise. `run` is the name of
    the run's folder, `history` has the run's epochs; `shown` are the fields of `advmoe.evaluation.snapshot`.
    """
    steps = {name.removeprefix("ra_"): value for name, value in evaluation.figures.items() if name[3:].isdigit()}
    return {
        "schema": SCHEMA,
        "run": run,
        "method": config.method,
        "backbone": config.model.backbone,
        "dataset": splits.name,
        "sa": evaluation.sa,
        "ra": steps,
        **{name: value for name, value in evaluation.figures.items() if name.startswith("ra_aa")},
        "ra_worst" if evaluation.complete else "ra_worst_quick": evaluation.worst,
        "epsilon": epsilon,
        "norm": norm,
        "gmacs": network.gmacs_ideal,
        "gmacs_executed": network.gmacs_executed,
        "gmacs_dense": dense.gmacs_ideal,
        "reduction": 100 * (1 - network.gmacs_ideal / dense.gmacs_ideal),
        "params": network.params,
        "epoch": epoch,
        "train_images": len(splits.train),
        "test_images": len(splits.test),
        "fingerprint": splits.fingerprint,
        "seed": config.seed,
        "attack_seed": attack_seed,
        "config": to_dict(replace(config, data=replace(config.data, data_dir=None))),  # places are no part of a run
        "train_seconds": sum(row["train_seconds"] for row in history),
        "evaluate_seconds": evaluate_seconds,
        "evaluation": evaluation.to_dict(),
        "history": [{name: row[name] for name in HISTORY if name in row} for row in history],
        "classes": list(splits.spec.classes),
        **shown,
        **provenance(),
    }


def evaluate_run(
    model: Classifier,
    config: RunConfig,
    splits: Splits,
    dense: Cost,
    options: EvaluationOptions,
    *,
    run: str,
    epoch: int,
    history: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """`evaluate` on the test part, as a Record; `dense` is the cost of the dense network.

    A part of the shards makes a Record without the fields of a snapshot.
    """
    started, x, y = time.perf_counter(), splits.test.pixels(), splits.test.labels
    evaluation = evaluate_with(model, x, y, options)
    threat = options.epsilon, options.norm, options.seed
    shown = {} if options.part[1] > 1 else snapshot(model, x, y, evaluation.correct, *threat, options.shard_size)
    return make_record(
        config, splits, evaluation, run=run, epoch=epoch, history=history, network=cost(model, splits.spec.shape), dense=dense,
        shown=shown, evaluate_seconds=time.perf_counter() - started, attack_seed=options.seed, epsilon=options.epsilon,
        norm=options.norm,
    )  # fmt: skip


def read_record(path: Path) -> dict[str, Any]:
    """The Record in a file, of this schema or an older one. Raises UserError where there is none."""
    try:
        content = json.loads(bounded_text(path, MAX_BYTES))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    return checked_record(content, str(path))


def checked_record(content: Any, where: str, told: Callable[[str], None] | None = None) -> dict[str, Any]:
    """What a JSON file at `where` holds, as a Record: fields that an older schema lacks are None or [].

    So are garbled parts that can be done without (`advmoe.evaluation.record_rules.PARTS`): `told` gets one line that names them.
    Raises UserError where it is something else, of a newer schema, or garbled elsewhere.
    """
    if not isinstance(content, dict) or "schema" not in content:
        raise UserError(f"{where}: holds no Record (advmoe evaluate writes them to RUN/record.json)")
    schema = content["schema"]
    if type(schema) is not int or schema < 1:
        raise UserError(f"{where}: holds no Record (schema {shown(schema)}; 1 to {SCHEMA} are known)")
    if schema > SCHEMA:
        raise UserError(f"{where}: holds a Record of schema {schema}; this advmoe reads 1 to {SCHEMA}: a newer one is needed")
    if not is_readable(content):
        raise UserError(f"{where}: holds no Record (nested more than {DEEPEST} deep, or with text that is no Unicode)")
    if schema < SCHEMA:
        content = dict(migrations.renamed(content))
    wrong = fault(content)
    if wrong:
        raise UserError(f"{where}: holds no Record ({wrong})")
    empty: dict[str, Any] = {**{name: [] for name in LISTS}, **dict.fromkeys(NULLABLE)}
    garbled = garbled_parts(content)
    if garbled and told:
        told(f"{where}: read without what is garbled in it: {', '.join(garbled)}")
    return empty | content | {name: empty.get(name) for name in garbled} | {"config": migrations.config(content["config"])}


def model_info(record: Mapping[str, Any]) -> dict[str, Any]:
    """The Record in RobustBench's model_info fields; `external` is RA-worst, `unreliable` where RA-AA stands above it."""
    info = {
        "link": "",
        "name": f"{record['method']}, {record['backbone']}",
        "authors": "",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": record["dataset"],
        "venue": "",
        "architecture": f"{record['backbone']}, {record['method']}",
        "eps": _eps(record["epsilon"]),
        "clean_acc": f"{record['sa']:.2f}",
    }
    if "ra_aa" in record:
        info["reported"] = info["autoattack_acc"] = f"{record['ra_aa']:.2f}"
    if "ra_worst" in record:
        info["external"] = f"{record['ra_worst']:.2f}"
        info["unreliable"] = autoattack_unreliable(record["evaluation"])
    return info


def autoattack_unreliable(evaluation: Mapping[str, Any]) -> bool:
    """Whether check 5 found RA-AA too far above RA-worst to be trusted."""
    return any(check["number"] == 5 and check["status"] == "fail" for check in evaluation["checks"])


def _eps(epsilon: float) -> str:
    """'8/255' for a whole number of 255ths, else the number."""
    parts = epsilon * 255
    return f"{round(parts)}/255" if abs(parts - round(parts)) < 1e-6 else f"{epsilon:g}"


def provenance() -> dict[str, Any]:
    """Code, versions, hardware and time."""
    cuda = torch.cuda.is_available()
    return {
        "advmoe": advmoe.__version__,
        "commit": _commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
        "hardware": {
            "cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
        },
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, '+changes' where files differ from it; None outside one."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not Path(git("rev-parse", "--show-toplevel"), "src", "advmoe").samefile(folder.parent):
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ":/src") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
