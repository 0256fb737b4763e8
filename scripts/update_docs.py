"""Write everything that is generated: the figures in results/ into README.md and docs/, between their markers, the schema of a
Record, the image of the README, and the costs that `advmoe recipes` prints.

python scripts/update_docs.py
"""

import json
import re
from collections.abc import Callable

from docs_blocks import choices, first_page, performance, reliability
from docs_blocks.markdown import table
from docs_blocks.sources import MORE_IMAGES, ROOT, main_records, records

from advmoe.attacks.registry import ATTACKS
from advmoe.evaluation.record import record_schema
from advmoe.files import write_atomically
from advmoe.recipes import RECIPES
from advmoe.reports.recipe_list import TABLE


def attacks() -> str:
    """Every attack that `advmoe evaluate --attacks` takes."""
    rows = ([f"`{name}`", attack.words, f"{attack.passes:,}"] for name, attack in ATTACKS.items())
    return table(["name", "attack", "passes"], rows, texts=2)


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "robustness": first_page.robustness,
        "methods": first_page.methods,
        "networks": first_page.packaged_networks,
        "standard": first_page.standard,
    },
    "docs/start.md": {"demo": first_page.demo},
    "docs/choices.md": {
        "choice": lambda: choices.choice(main_records()),
        "pairs": choices.pairs,
        "gains": lambda: choices.gains_of_networks(main_records()),
        "more images": lambda: choices.choice(records(MORE_IMAGES)),
        "gains on more images": lambda: choices.gains_of_networks(records(MORE_IMAGES)),
    },
    "docs/ingredients.md": {"ingredients": choices.ingredients, "gains": choices.gains_of_ingredients},
    "docs/evaluation.md": {"attacks": attacks},
    "docs/cost.md": {"profile": performance.costs},
    "docs/reliability.md": {
        "scaling": lambda: performance.ratios("scaling", ("scaling",)),
        "faults": reliability.faults,
        "fuzz": reliability.fuzz,
    },
    "docs/performance.md": {
        "glance": performance.glance,
        "inference": lambda: performance.ratios("inference", ("inference",)),
        "training": lambda: performance.ratios("training", ("training",)),
        "narrow training": lambda: performance.ratios("training_width16", ("training",), targets=False),
        "memory": lambda: performance.ratios("memory", ("memory",)),
        "benchmark": lambda: performance.ratios("speed", ("attack", "data")),
        "waiting": lambda: performance.ratios("waiting", ("waiting",)),
        "growth": lambda: performance.ratios("growth", ("growth",)),
        "operators": lambda: performance.parts("operators"),
        "iteration": lambda: performance.parts("iteration"),
        "export": performance.exports,
        "low precision": performance.low_precision,
    },
}


def schema() -> str:
    """docs/record.schema.json."""
    return json.dumps(record_schema(), indent=1) + "\n"


def main() -> None:
    """Rewrite the files. Raises ValueError if a page has no such block."""
    for page, blocks in BLOCKS.items():
        text = (ROOT / page).read_text()
        for block, content in blocks.items():
            parts = re.split(rf"(?<=<!-- {block} -->\n).*?(?=<!-- /{block} -->)", text, flags=re.S)
            if len(parts) == 1:
                raise ValueError(f"{page}: has no block between <!-- {block} --> and <!-- /{block} -->")
            text = f"{content()}\n".join(parts)
        write_atomically(ROOT / page, text)
    write_atomically(ROOT / "docs/record.schema.json", schema())
    write_atomically(TABLE, performance.recipe_table(RECIPES))
    first_page.draw_image()


if __name__ == "__main__":
    main()
