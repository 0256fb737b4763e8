"""README and docs: Python blocks run, links lead to files, and figures are those of the Records."""

import re
from pathlib import Path

import pytest
import update_docs
from docs_blocks import choices, first_page
from docs_blocks.performance import pivot
from docs_blocks.sources import records, report
from PIL import Image

from advmoe.sweep.grid import read_sweep
from advmoe.sweep.plan import plan

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S))
]


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("code", BLOCKS)
def test_python_block_runs(code):
    exec(compile(code, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_exist(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
    if page.parent.name == "docs":  # the site has the folder docs, the JSON files in results/, and no other file
        assert [link for link in links if link.startswith("..") and not re.fullmatch(r"\.\./results/.*\.json", link)] == []


def test_the_published_schema_is_the_records():
    assert (ROOT / "docs/record.schema.json").read_text() == update_docs.schema()


@pytest.mark.parametrize(("page", "block"), [(page, block) for page, blocks in update_docs.BLOCKS.items() for block in blocks])
def test_figures_are_the_records(page, block):
    assert f"<!-- {block} -->\n{update_docs.BLOCKS[page][block]()}\n<!-- /{block} -->" in (ROOT / page).read_text()


def test_the_times_of_the_demo_are_its_records():
    demo = {record.method: record for record in records("results/demo/records.json")}
    evaluations = {  # these Records are older than `evaluate_seconds` of continued evaluations
        name: max(record.evaluate_seconds, sum(attack.seconds for attack in record.evaluation.attacks.values()))
        for name, record in demo.items()
    }
    network, total = demo["advmoe"], sum(record.train_seconds + evaluations[name] for name, record in demo.items())
    start, readme = ((ROOT / page).read_text() for page in ("docs/start.md", "README.md"))
    assert f"It takes about {network.train_seconds / 60:.0f} minutes on two cores." in start
    assert f"in about {total / 60:.0f} minutes on two cores, and writes `demo/report.html`" in start
    assert f"(about {total / 60:.0f} minutes on 2 cores)" in readme


def test_the_time_and_memory_of_an_iteration_are_the_measured_ones():
    times, peaks = (pivot(report(name).rows) for name in ("training", "memory"))
    seconds = times["iteration, ResNet-18, batch 128"]["AdvMoE"].value
    peak = peaks["peak memory, iteration, ResNet-18, batch 128"]["AdvMoE"].value
    paper, own_images = ((ROOT / "docs" / page).read_text() for page in ("paper.md", "own-images.md"))
    assert f"takes about {seconds:.1f} seconds" in paper
    assert f"takes about {seconds:.1f} seconds on two cores" in own_images
    assert f"AdvMoE needs {peak / 1e9:.1f} GB of memory" in own_images


def test_every_run_of_the_ingredients_has_a_row(monkeypatch):
    runs = plan(read_sweep(str(ROOT / "results/choices/ingredients.yaml")))
    (record, *_) = records("results/choices/ingredients.json")
    planned = [record.model_copy(update={"run": run.name, "seed": run.config.seed}) for run in runs]
    monkeypatch.setattr(choices, "records", lambda _: planned)
    rows = choices.ingredients().splitlines()[2:]
    assert len(rows) == len({run.name.removesuffix(f"-s{run.config.seed}") for run in runs})


def test_the_image_in_readme_is_drawn_from_the_records():
    """If this fails, run python scripts/update_docs.py: it draws the image again."""
    with Image.open(ROOT / first_page.IMAGE) as image:
        assert image.text[first_page.DIGEST] == first_page.records_digest()
