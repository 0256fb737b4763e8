"""The hook of the site: formulas, links and added files. `make docs` builds the whole site."""

from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("latex2mathml")
import docs_site as site  # needs both

ROOT = Path(__file__).parents[1]


def page(name):
    return SimpleNamespace(file=SimpleNamespace(src_uri=name))


def test_formulas_become_mathml():
    html = site.on_page_content(
        r'<p>of <span class="arithmatex">\(r^2\)</span></p><div class="arithmatex">\[' + "\na &lt; b\n" + r"\]</div>"
    )
    assert "arithmatex" not in html
    inline, block = ElementTree.fromstring(f"<all>{html}</all>").iter("{http://www.w3.org/1998/Math/MathML}math")
    assert (inline.get("display"), block.get("display")) == ("inline", "block")
    assert ["".join(formula.itertext()) for formula in (inline, block)] == ["r2", "a<b"]


def test_links_to_records_stay_within_the_site():
    text = "[a](../results/x.json) [b](../../results/benchmarks/y.json) [c](../images/z.png)"
    assert site.on_page_markdown(text, page("cost.md")) == "[a](results/x.json) [b](results/benchmarks/y.json) [c](../images/z.png)"
    assert site.on_page_markdown("[a](../../results/x.json)", page("api/moe.md")) == "[a](../results/x.json)"
    assert site.on_page_markdown("[a](docs/choices.md)", page("contributing.md")) == "[a](choices.md)"


def test_records_and_pages_of_the_repositorys_root_are_in_the_site(monkeypatch):
    files = []
    generated = SimpleNamespace(generated=lambda config, target, abs_src_path: (target, Path(abs_src_path)))
    monkeypatch.setattr(site, "File", generated)
    site.on_files(files, config=None)
    assert ("contributing.md", ROOT / "CONTRIBUTING.md") in files
    assert ("results/benchmarks/rerouting.json", ROOT / "results/benchmarks/rerouting.json") in files
    assert all(source.is_file() for _, source in files)
