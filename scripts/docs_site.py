"""Hooks that mkdocs.yml names.

Formulas become MathML, which browsers display without a script from another server. The site also contains
all JSON files in results/, and the report's page, results/report.html.
"""

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINKED = re.compile(r"\]\((?:\.\./)+(results/[^)#]+)\)")
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', flags=re.S)
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}  # in the repository's root -> in the site


def on_files(files: Any, config: Any) -> Any:
    """Add the results behind the pages' figures, and the pages in the repository's root."""
    records = (path.relative_to(ROOT) for path in (ROOT / "results").rglob("*.json"))
    for source, target in {**{str(path): str(path) for path in records}, **PAGES}.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_post_build(config: Any) -> None:
    """Add the report's page, which is made from results/."""
    target = Path(config["site_dir"]) / "results/report.html"
    subprocess.run([sys.executable, str(ROOT / "scripts/report_page.py"), str(target)], check=True)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change links to results, and links into docs/ from the repository's root, to their paths in the site."""
    if page.file.src_uri in PAGES.values():
        return markdown.replace("](docs/", "](")
    return LINKED.sub(rf"]({'../' * page.file.src_uri.count('/')}\1)", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Replace formulas by MathML."""
    return FORMULA.sub(lambda match: mathml(html.unescape(match["latex"]), match["tag"] == "div"), content)


def mathml(latex: str, block: bool) -> str:
    """A formula in LaTeX as MathML, as a block or inside the text."""
    return str(convert(latex.strip(), display="block" if block else "inline"))
