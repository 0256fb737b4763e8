"""`advmoe export`."""

import json
import re
from dataclasses import replace

import pytest
import torch
from refused_commands import refused
from small_backbone import SMALLEST

from advmoe.cli import export as command
from advmoe.cli.main import main
from advmoe.errors import UserError
from advmoe.export import Encoding
from advmoe.export.compare import Comparison
from advmoe.export.traceable import Traceable

TINY = ["--recipe", "demo-advmoe", "--width", "4", "--limit-train", "100", "--limit-test", "12", "--batch-size", "20"]
TINY += ["--num-steps", "1", "--epochs", "1", "--tied-share", "0", "--backbone", SMALLEST, "--epsilon", "0.02", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *TINY, "--out", str(out)]) == 0
    return out


def run_export(capsys, *arguments):
    capsys.readouterr()
    assert main(["export", *(str(argument) for argument in arguments)]) == 0
    return capsys.readouterr()


def error_line(capsys, *arguments):
    return refused(capsys, "export", *arguments)


def test_writes_and_compares_on_real_images(run, tmp_path, capsys):
    captured = run_export(capsys, run, "--out", tmp_path / "network.onnx", "--check", "40")
    lines = captured.out.splitlines()
    assert lines[0].startswith(str(tmp_path / "network.onnx"))
    for line, batch in zip(lines[1:], (1, 7, 64), strict=True):
        assert line.startswith(f"batch {batch:2}, 40 images: the same classes and routes as PyTorch, logits within ")
    assert "has no Record of its best epoch, so its robust accuracy is unknown" in captured.err


def test_json_and_the_metadata_in_the_file(run, tmp_path, capsys):
    path = tmp_path / "network.pt2"
    result = json.loads(run_export(capsys, run, "--out", path, "--check", "20", "--json").out)
    assert result["format"] == "torch-export"  # by the suffix
    compared = [(row["batch"], row["images"], row["equal"]) for row in result["compared"]]
    assert compared == [(batch, 20, True) for batch in (1, 7, 64)]
    extra = {"advmoe": ""}
    torch.export.load(path, extra_files=extra)
    facts = json.loads(extra["advmoe"])
    assert facts["input_size"] == [1, 28, 28]
    assert len(facts["classes"]) == 10
    assert facts["threat_model"] == {"norm": "Linf", "epsilon": 0.02}
    assert facts["config"]["method"] == "advmoe"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_network_that_was_evaluated_has_its_record_in_the_file(stand_in, tmp_path, capsys, dtype):
    captured = run_export(capsys, "cifar10-w32", "--out", tmp_path / "network.pt2", "--dtype", dtype, "--check", "0")
    facts = stand_in[0]["facts"]
    assert facts["dtype"] == dtype
    assert (facts["record"] is None) == (dtype != "float32")
    assert ("written without the Record, which is of the network in float32, not in" in captured.err) == (dtype != "float32")
    if dtype == "float32":
        assert (facts["record"]["method"], facts["record"]["gallery"]) == ("advmoe", [])


@pytest.fixture
def stand_in(monkeypatch):
    """Replace the export, which takes seconds, by the network itself, and write a placeholder file. A list of its options."""
    calls = []

    def write(model, shape, path, **options):
        calls.append(options)
        path.write_bytes(b"file")
        return torch.no_grad(Traceable(model))

    monkeypatch.setattr(command, "export", write)
    return calls


def test_a_lower_precision_is_reported_not_refused(run, stand_in, tmp_path, capsys):
    arguments = (run, "--out", tmp_path / "network", "--check", "20")
    lines = run_export(capsys, *arguments, "--format", "onnx", "--dtype", "int8").out.splitlines()
    assert lines[0].endswith("onnx, int8")
    for line, batch in zip(lines[1:], (1, 7, 64), strict=True):
        pattern = rf"batch {batch:2}, 20 images: [\d.]+ % in the same class as PyTorch in float32, [\d.]+ % by the same route; "
        assert re.fullmatch(pattern + r"accuracy [+-][\d.]+ points", line)
    output = run_export(capsys, *arguments, "--format", "torch-export", "--dtype", "bfloat16", "--json").out
    report = json.loads(output)
    assert (report["dtype"], [row["batch"] for row in report["compared"]]) == ("bfloat16", [1, 7, 64])
    int8, bfloat16 = stand_in
    assert (int8["encoding"], bfloat16["encoding"]) == (Encoding("onnx", "int8"), Encoding("torch-export", "bfloat16"))
    assert bfloat16["calibration"] is None
    assert (int8["calibration"].dtype, int8["calibration"].shape[1:]) == (torch.float32, (1, 28, 28))
    assert 0 < int8["calibration"].max() <= 1


def test_int8_without_its_calibration_data_is_one_line(run, tmp_path, capsys, monkeypatch):
    def gone(config):
        raise UserError("fashion-mnist: gone")

    monkeypatch.setattr(command, "load_dataset", gone)
    arguments = ("--out", str(tmp_path / "network.onnx"), "--dtype", "int8", "--check", "0")
    assert main(["export", str(run), *arguments]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ")
    assert "int8 is calibrated on training images, which cannot be read: fashion-mnist: gone" in error
    assert list(tmp_path.iterdir()) == []


def test_noise_is_compared_if_the_data_cannot_be_read(run, stand_in, tmp_path, capsys, monkeypatch):
    def gone(config):
        raise UserError("fashion-mnist: gone")

    monkeypatch.setattr(command, "load_dataset", gone)
    captured = run_export(capsys, run, "--out", tmp_path / "network.pt2")
    assert "compared on 64 images of noise, because the test images cannot be read: fashion-mnist: gone" in captured.err
    assert "64 images: the same" in captured.out


def test_no_check_compares_nothing(run, stand_in, tmp_path, capsys):
    captured = run_export(capsys, run, "--out", tmp_path / "network.pt2", "--check", "0")
    assert captured.out.count("\n") == 1


def test_a_file_with_other_outputs_ends_with_status_2(run, stand_in, tmp_path, capsys, monkeypatch):
    real = command.export

    def other(*arguments, **options):
        predict = real(*arguments, **options)
        return lambda pixels: (predict(pixels)[0] + 1, predict(pixels)[1])

    monkeypatch.setattr(command, "export", other)
    assert main(["export", str(run), "--out", str(tmp_path / "network.pt2"), "--check", "12"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "differs from PyTorch on 12 of 12 images: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..." in message


def test_a_file_that_could_not_be_compared_on_any_image_ends_with_status_2(run, stand_in, tmp_path, capsys, monkeypatch):
    everywhere = Comparison(batch=1, images=12, differing=(), undecided=tuple(range(12)), largest=0.0)
    monkeypatch.setattr(command, "compare", lambda *arguments: everywhere)
    out = tmp_path / "network.pt2"
    assert main(["export", str(run), "--out", str(out), "--check", "12"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{out}: was not compared with PyTorch: rounding decides the route of every image" in message


def test_an_untrained_network_gives_a_warning(run, stand_in, tmp_path, capsys, monkeypatch):
    real = command.outputs

    def constant_outputs(model, pixels):
        outputs = real(model, pixels)
        return replace(outputs, logits=torch.zeros_like(outputs.logits))

    monkeypatch.setattr(command, "outputs", constant_outputs)
    monkeypatch.setattr(command, "compare", lambda *_: [])
    monkeypatch.setattr(command, "BATCHES", ())
    captured = run_export(capsys, run, "--out", tmp_path / "network.pt2", "--check", "100")
    assert "is right on 10.0 % of 100 images, no more than a guess: it looks untrained" in captured.err


def test_what_cannot_be_done_is_one_line(run, tmp_path, capsys):
    for arguments, message in (
        ((run, "--out", tmp_path), "is a folder; the exported file must go to a file"),
        ((run, "--out", tmp_path / "a.txt"), "a.txt: give a name that ends in .onnx (onnx) or .pt2 (torch-export), or --format"),
        ((run, "--out", tmp_path / "no/where.onnx"), "no such folder for the exported file"),
        ((run, "--out", tmp_path / "a.onnx", "--check", "-1"), "check must be at least 0, not -1"),
        ((run, "--out", tmp_path / "a.onnx", "--dtype", "bfloat16"), "ONNX Runtime's CPU provider has no bfloat16 convolution"),
        ((run, "--out", tmp_path / "a.pt2", "--dtype", "int8"), "torch-export has no int8"),
        ((tmp_path, "--out", tmp_path / "a.onnx"), "holds no run"),
    ):
        error = error_line(capsys, *arguments)
        assert message in error
    assert list(tmp_path.iterdir()) == []


# The network is never replaced


def test_the_exported_file_replaces_neither_the_network_nor_a_file_of_the_run(run, tmp_path, capsys):
    network = tmp_path / "net.safetensors"
    network.write_bytes(b"mine")
    error = error_line(capsys, network, "--format", "torch-export", "--out", network)
    assert error == f"advmoe: error: {network}: the exported file could replace {network}; give another name\n"
    assert network.read_bytes() == b"mine"
    error = error_line(capsys, run, "--format", "onnx", "--out", run / "config.yaml")
    assert f"could replace a file of {run}; give another name" in error
