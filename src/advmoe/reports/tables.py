"""Records as tables."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def record_table(records: Sequence[dict[str, Any]], title: str) -> Table:
    """One row a Record: accuracies in percent, cost against dense."""
    table = Table(title=f"{title}; SA and RA in %", title_justify="left")
    table.add_column("method", no_wrap=True)
    for name in ("SA", *(f"RA-{steps}" for steps in records[0]["ra"]), "GMACs", "vs dense", "params"):
        table.add_column(name, justify="right")
    for record in records:
        robust = [f"{value:.1f}" for value in record["ra"].values()]
        reduction = f"{-record['reduction']:+.0f} %" if record["gmacs"] != record["gmacs_dense"] else "1 x"
        cells = [f"{record['sa']:.1f}", *robust, f"{record['gmacs']:.4f}", reduction, f"{record['params']:,}"]
        table.add_row(record["method"], *cells)
    return table
