"""The installed package: what its import costs, the contents of its wheel, and a run without the repository."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

import advmoe

ROOT = Path(__file__).parents[1]
HEAVY = {  # what `advmoe.load` can do without
    "torch._dynamo", "torch._inductor", "torch.onnx", "torch.utils.tensorboard", "triton", "matplotlib", "scipy", "sympy", "onnx",
    "onnxruntime", "onnxscript", "huggingface_hub", "datasets", "pyautoattack", "tensorboard", "wandb", "ray", "rich", "jinja2",
}  # fmt: skip
FLAGSHIP = "cifar10-w32"  # a network that is part of the package
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def test_import_takes_little_longer_than_torchs():
    """Including what `import advmoe` imports lazily, it adds no heavy library to what torch imports."""
    code = f"import sys, torch; alone = set(sys.modules); import advmoe; advmoe.load; print(*{HEAVY} & sys.modules.keys() - alone)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"


def test_import_alone_does_not_import_torch():
    code = "import sys, advmoe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_citation_names_the_paper_and_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == advmoe.__version__
    paper = cited["preferred-citation"]
    assert paper["title"] == "Robust Mixture-of-Expert Training for Convolutional Neural Networks"
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Zhang", "Cai", "Chen", "Zhang", "Zhang", "Chen", "Chang", "Wang", "Liu"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that `python -m build` makes from a copy of the repository, without files of earlier builds."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run([sys.executable, "-m", "build", "--wheel", str(copy)], check=True, capture_output=True)
    (path,) = (copy / "dist").iterdir()
    return path


@pytest.mark.slow
def test_the_wheel_has_exactly_the_files_of_the_package(wheel):
    source = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/advmoe").rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not re.match(r"advmoe-[^/]*\.dist-info/", name)}
    assert packed == {name for name in source if "__pycache__" not in name}


@pytest.mark.slow
def test_wheel_runs_in_an_empty_environment_away_from_the_repository(wheel, tmp_path):
    def run(*command):
        return subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout

    run(sys.executable, "-m", "venv", "empty")
    run("empty/bin/pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel))
    location = run("empty/bin/python", "-c", "import advmoe; print(advmoe.__file__)")
    assert Path(location.strip()).is_relative_to(tmp_path)
    assert "missing: pyautoattack" in run("empty/bin/advmoe", "doctor")
    network = shlex.split("--width 4 --limit-train 40 --limit-test 10 --batch-size 20 --epochs 1 --device cpu")
    run("empty/bin/advmoe", "train", "--recipe", "demo-advmoe", *network, "--out", "run")
    assert "RA-worst" in run("empty/bin/advmoe", "evaluate", "run", "--device", "cpu")
    loads = "import advmoe, torch; model = advmoe.load('run'); print(model(torch.rand(2, *model.input_size)).shape)"
    assert run("empty/bin/python", "-c", loads) == "torch.Size([2, 10])\n"
    Image.new("RGB", (48, 32), "skyblue").save(tmp_path / "photo.png")
    assert "airplane" in run("empty/bin/advmoe", "predict", FLAGSHIP, "photo.png")
    assert "At epsilon 8/255 it withstood every attack" in run("empty/bin/advmoe", "attack", FLAGSHIP, "photo.png")
