"""The blocks of docs/reliability.md: injected faults and hostile inputs."""

from docs_blocks.markdown import table
from docs_blocks.sources import read


def faults() -> str:
    """The faults injected into running processes, and how often the run survived."""
    results = read("results/faults.json")
    rows = []
    for fault in dict.fromkeys(row["fault"] for row in results["faults"]):
        of_fault = [row for row in results["faults"] if row["fault"] == fault]
        done, survived = (sum(row[name] for row in of_fault) for name in ("tried", "survived"))
        rows.append([fault, str(len(of_fault)), str(done), f"{survived}{'' if survived == done else ' **fewer**'}"])
    versions = in_versions(results["versions"] | {name: results[name] for name in ("advmoe", "commit") if name in results})
    caption = f"`{results['command']}`, seed {results['seed']}, {versions}."
    return f"{table(['fault', 'methods', 'done', 'survived'], rows)}\n\n{caption}"


def fuzz() -> str:
    """The number of hostile inputs that each reader was tested with."""
    results = read("results/fuzz.json")
    rows = [[row["reader"], f"{row['inputs']:,}", f"{row['seconds']:.0f}", str(row["failures"])] for row in results["readers"]]
    caption = f"`{results['command']}`, {in_versions(results['versions'])}."
    return f"{table(['reader', 'inputs', 'seconds', 'failures'], rows)}\n\n{caption}"


def in_versions(versions: dict[str, str]) -> str:
    """'python 3.11.7, torch 2.13.0'."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())
