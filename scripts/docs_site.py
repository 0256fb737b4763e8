"""What turns docs/ into a site beyond Markdown; mkdocs.yml names it as a hook.

Formulas become MathML, which browsers draw without a script from elsewhere; files of the repository that pages link to become
part of the site.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINKED = re.compile(r"\]\((?:\.\./)+((?:benchmarks/)?results/[^)#]+)\)")
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', flags=re.S)
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}  # in the repository's root -> in the site


def on_files(files: Any, config: Any) -> Any:
    """Add the Records behind the pages' figures, and the pages that lie in the repository's root."""
    records = (path.relative_to(ROOT) for name in ("results", "benchmarks/results") for path in (ROOT / name).rglob("*.json"))
    for source, target in {**{str(path): str(path) for path in records}, **PAGES}.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to Records, and links into docs/ from the repository's root, lead to where the site has them."""
    if page.file.src_uri in PAGES.values():
        return markdown.replace("](docs/", "](")
    return LINKED.sub(rf"]({'../' * page.file.src_uri.count('/')}\1)", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML."""
    return FORMULA.sub(lambda found: mathml(html.unescape(found["latex"]), found["tag"] == "div"), content)


def mathml(latex: str, block: bool) -> str:
    """A formula in LaTeX as MathML, on a line of its own or in the text."""
    return str(convert(latex.strip(), display="block" if block else "inline"))
