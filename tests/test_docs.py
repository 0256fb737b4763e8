"""What README and docs say: their Python runs, their figures are the Records'."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_block_runs(code):
    exec(compile(code, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_exist(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readme_table_is_the_records():
    text = (ROOT / "README.md").read_text()
    for record in json.loads((ROOT / "results/demo/records.json").read_text()):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{record['method']}` |")]
        for value in (record["ra_worst"], record["sa"], record["ra"]["50"], record["ra_aa"]):
            assert f"{value:.1f}" in line
