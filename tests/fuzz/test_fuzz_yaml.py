"""Configurations and sweeps in YAML."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from damage_bytes import damaged, odd_trees
from driver import counts, drive, read
from hypothesis import strategies as st

from advmoe.config import RunConfig, dump_yaml, from_dict, load_yaml, to_dict
from advmoe.errors import UserError
from advmoe.sweep.grid import SweepFile, read_sweep
from advmoe.sweep.plan import plan

MARK = "ran"
SWEEP = """
methods: [at_dense, advmoe]
datasets: [fashion-mnist]
model_scales: [0.25, 0.5]
seeds: [3, 7]
settings: {training: {epochs: 2, lr: 5e-2}, model: {num_experts: 4}, attack: {epsilon: 8/255}}
"""
FIELDS = [f"{section}.{name}" for section, fields in to_dict(RunConfig()).items() if isinstance(fields, dict) for name in fields]
FIELDS += ["schema", "method", "seed", "model", "training", "runtime", "x", "data.x"]
PARTS = ["methods", "backbones", "datasets", "model_scales", "seeds", "settings", "num_experts"]
PARTS += ["recipes", "variants", "grids", "preset", "x"]
SCALARS = st.one_of(
    st.sampled_from(
        [
            "!!int ''",
            "!!float ''",
            "!!bool x",
            "!!timestamp x",
            "!!binary '*'",
            "!!null x",
            "!!omap [1]",
            "!!set {a, b}",
            "!!pairs [[]]",
            "!!python/object/apply:os.system [touch ran]",
            "!!python/name:os.system",
            "!!python/object/new:os.system [x]",
            "!!x y",
            "!!merge x",
            "!!value x",
            "!!str [1]",
            "!!map [1]",
            "!!seq {}",
            "2020-13-45",
            "2020-01-01 00:00:00+99:99",
            "0x" + "f" * 5000,
            "0b" + "1" * 5000,
            "0" + "7" * 6000,
            "1" * 5000,
            "1:" * 200 + "1",
            "1:" * 200 + "1.5",
            "1_0",
            ".nan",
            "-.inf",
            "1e999",
            "=",
            "<<",
            "*a",
            "&a [*a, *a]",
            "&a {<<: *a}",
            "&b [*a, *a, *a, *a, *a, *a, *a, *a, *a]",
            "{? [a] : b}",
            "{? {a: b} : c}",
            "[" * 400,
            "{a: " * 300,
            "'",
            '"\\ud800"',
            '"\\0"',
            '"\\x1b[2J"',
            "|\n  x",
            "%YAML 9.9",
            "---",
            "...",
            "!<tag:x> y",
            "!!int 1__",
            "+",
            "-",
        ]
    ),
    odd_trees().map(lambda tree: yaml.safe_dump(tree, default_flow_style=True, width=10**9).removesuffix("...\n").strip()),
)


def texts(names: list[str], valid: list[str]) -> st.SearchStrategy[bytes]:
    """YAML of the reader's fields with odd values, damaged valid text, and random bytes."""
    lines = st.tuples(st.one_of(st.sampled_from(names), SCALARS), SCALARS).map(_line)
    documents = st.lists(lines, min_size=1, max_size=5).map("\n".join)
    bombs = st.integers(1, 12).flatmap(
        lambda depth: st.sampled_from(["[{0}]", "{{<<: [{0}]}}"]).map(lambda form: _bomb(form, depth))
    )
    encoded = st.one_of(
        documents, bombs, st.sampled_from(names).flatmap(lambda name: bombs.map(lambda bomb: f"{bomb}\n{name}: *z"))
    )
    return st.one_of(
        encoded.map(lambda text: text.encode(errors="surrogatepass")),
        damaged(*(text.encode() for text in valid)),
        st.binary(max_size=40),
    )


def _line(pair: tuple[str, str]) -> str:
    section, dot, name = pair[0].partition(".")
    return f"{section}: {{{name}: {pair[1]}}}" if dot and name.isidentifier() else f"{pair[0]}: {pair[1]}"


def _bomb(form: str, depth: int) -> str:
    """Aliases of aliases: nine times as many values at every level."""
    levels = ["a0: &a0 {x: 1, y: 2}"]
    levels += [
        f"a{level}: &{'z' if level == depth else f'a{level}'} " + form.format(", ".join([f"*a{level - 1}"] * 9))
        for level in range(1, depth + 1)
    ]
    return "\n".join(levels)


@counts
def test_configurations(inputs: int, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that is read can be written and read again."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        result = read(lambda: load_yaml(path))
        if not isinstance(result, UserError):
            assert from_dict(yaml.safe_load(dump_yaml(result))) == result
        assert not (tmp_path / MARK).exists()

    drive(request, inputs, "configuration (YAML)", texts(FIELDS, [dump_yaml(RunConfig())]), tmp_path, check)


@counts
def test_sweeps(inputs: int, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that is read can be planned."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "grid.yaml"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        result: Any = read(lambda: read_sweep(str(path)))
        if isinstance(result, SweepFile):
            read(lambda: plan(result))
        assert not (tmp_path / MARK).exists()

    drive(request, inputs, "sweep (YAML)", texts(PARTS, [SWEEP]), tmp_path, check)
