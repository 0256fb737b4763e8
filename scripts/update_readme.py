"""Write the figures of results/demo/records.json and the table of costs into README.md, between its markers.

python scripts/update_readme.py
"""

import json
import re
from pathlib import Path
from typing import Any

from advmoe.reports.costs import profile_markdown

ROOT = Path(__file__).parents[1]
COLUMNS = ("RA-worst", "SA", "RA-50", "RA-AA", "GMACs", "against dense")


def row(record: dict[str, Any]) -> str:
    """One Record as a line of the table."""
    figures = [record["ra_worst"], record["sa"], record["ra"]["50"], record["ra_aa"]]
    low, high = record["evaluation"]["intervals"]["ra_worst"]
    cells = [f"{figures[0]:.1f} ({low:.0f} to {high:.0f})", *(f"{value:.1f}" for value in figures[1:])]
    reduction = "" if record["gmacs"] == record["gmacs_dense"] else f"{-record['reduction']:+.0f} %"
    return " | ".join(["", f"`{record['method']}`", *cells, f"{record['gmacs']:.4f}", reduction, ""]).strip()


def table(records: list[dict[str, Any]]) -> str:
    """Records as a Markdown table, with the sentence that says what they are."""
    first = records[0]
    head = ["| method | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    config = first["config"]
    said = (
        f"ResNet-18 of width {config['model']['width']}, {first['train_pictures']} training pictures of {first['dataset']}, "
        f"{config['training']['epochs']} epochs, one seed; {first['test_pictures']} test pictures, epsilon {first['epsilon']:g}, "
        "`--standard`; percent, 95 % interval in brackets.\nIt shows that the parts work together, not what the method is worth."
    )
    return "\n".join([*head, *(row(record) for record in records), "", said])


def main() -> None:
    """Rewrite the README."""
    records = json.loads((ROOT / "results/demo/records.json").read_text())
    text = (ROOT / "README.md").read_text()
    for block, content in {"demo": table(records), "profile": profile_markdown()}.items():
        parts = re.split(rf"(?<=<!-- {block} -->\n).*?(?=<!-- /{block} -->)", text, flags=re.S)
        text = f"{content}\n".join(parts)
    (ROOT / "README.md").write_text(text)


if __name__ == "__main__":
    main()
