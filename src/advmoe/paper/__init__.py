"""The cells of the paper's tables A1 and A2, as printed."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from advmoe.config import ModelConfig

PAPER_METHODS = ("at_dense", "at_small_dense", "at_sparse", "at_moe", "advmoe")  # in the order of the tables


@dataclass(frozen=True)
class PrintedCell:
    """One method's row of a table at one model scale. Accuracies and deviations in percent, table A2 has no RA-AA;
    `gflops` are multiply-accumulates in billions, `reduction` is the printed percentage against the dense network, if any."""

    table: str
    dataset: str
    model: str
    model_scale: float
    attack_steps: int
    method: str
    ra: float
    ra_std: float
    ra_aa: float | None
    ra_aa_std: float | None
    sa: float
    sa_std: float
    gflops: float
    reduction: float | None

    @property
    def recipe(self) -> str:
        """Name of the recipe that reproduces the cell."""
        scale = "" if self.model_scale in (1.0, ModelConfig().model_scale) else f"-r{self.model_scale}"
        return f"{self.dataset}-{self.model}-{self.method}{scale}{'-steps10' if self.attack_steps == 10 else ''}"


@cache
def printed_cells() -> tuple[PrintedCell, ...]:
    """All cells: table A1, then A2."""
    return tuple(_cell(table, row) for table in ("A1", "A2") for row in _rows(f"table_{table.lower()}.csv"))


def _rows(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(files(__package__).joinpath(name).read_text(encoding="utf-8").splitlines()))


def _cell(table: str, row: dict[str, str]) -> PrintedCell:
    def number(name: str) -> float | None:
        return float(row[name]) if row.get(name) else None

    return PrintedCell(
        table, row["dataset"], row["model"], float(row["model_scale"]), int(row["attack_steps"]), row["method"],
        ra=float(row["ra"]), ra_std=float(row["ra_std"]), ra_aa=number("ra_aa"), ra_aa_std=number("ra_aa_std"),
        sa=float(row["sa"]), sa_std=float(row["sa_std"]), gflops=float(row["gflops"]), reduction=number("reduction"),
    )  # fmt: skip
