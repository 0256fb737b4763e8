"""A network as an ONNX file whose convolutions are of 8-bit integers, by ONNX Runtime's static quantisation.

Range and step of each convolution's input and output come from real images. Weights and activations are unsigned: on processors
without VNNI instructions the products of signed ones saturate, and the same file would say something else there.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from advmoe.export.onnx import INPUT, check_extra, onnx_predictor, write_onnx
from advmoe.files import drafted
from advmoe.quiet import quiet

BATCH = 256  # images that are looked at together, so that in nearly every batch somebody chooses each expert
SEEN = 16  # calibration images that an expert must have got, or its range is guesswork and it stays as it is


def write_int8(program: ExportedProgram, path: Path, facts: Mapping[str, str], pixels: Tensor) -> None:
    """Write a traced network as `advmoe.export.onnx.write_onnx` does, its convolutions calibrated on `pixels` [n, C, H, W].

    Routers, the first convolution, the classifier, and experts that fewer than SEEN of the images chose stay float32.
    """
    check_extra()
    import onnx  # noqa: PLC0415 (an extra)

    with tempfile.TemporaryDirectory() as folder:
        exact, rough = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        write_onnx(program, exact, facts)
        _quantise(exact, rough, pixels, _convolutions(onnx.load(exact).graph, _chosen(exact, pixels)))
        onnx.checker.check_model(rough, full_check=True)
        with drafted(path) as draft:
            draft.write_bytes(rough.read_bytes())


def _quantise(exact: Path, rough: Path, pixels: Tensor, names: list[str]) -> None:
    from onnxruntime import quantization  # noqa: PLC0415 (an extra)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(pixels.split(BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    unsigned = quantization.QuantType.QUInt8
    with quiet():  # its advice on what to do before
        quantization.quantize_static(
            exact, rough, Reader(), quant_format=quantization.QuantFormat.QDQ, op_types_to_quantize=["Conv"],
            nodes_to_quantize=names, activation_type=unsigned, weight_type=unsigned,
        )  # fmt: skip


def _chosen(path: Path, pixels: Tensor) -> list[dict[int, int]]:
    """For each choice of a route, how many of the images each expert got; none of a network without experts."""
    found = [answer[1] for answer in map(onnx_predictor(path), pixels.split(BATCH)) if len(answer) > 1]
    if not found:
        return []
    return [dict(enumerate(torch.bincount(experts).tolist())) for experts in torch.cat(found).T]


def _convolutions(graph: Any, chosen: list[dict[int, int]]) -> list[str]:
    """The names of the nodes to quantise. A node's filters are called `network.LAYER.weight`, or `network.LAYER.experts.E.weight`;
    a layer's experts stand in their order (E does not tell: of equal filters one is kept)."""
    filters = {node.name: node.input[1] for node in graph.node if node.op_type == "Conv"}
    own = {name: weight for name, weight in filters.items() if not weight.startswith("network.router.")}
    layers: dict[str, list[str]] = {}
    for name, weight in own.items():
        if ".experts." in weight:
            layers.setdefault(weight.partition(".experts.")[0], []).append(name)
    rare = set()
    for place, experts in enumerate(layers.values()):
        counts = chosen[min(place, len(chosen) - 1)]  # one choice may serve all layers
        rare |= {name for expert, name in enumerate(experts) if counts.get(expert, 0) < SEEN}
    return [name for name in list(own)[1:] if name not in rare]
