"""A network as an ONNX file with 8-bit integer convolutions, by ONNX Runtime's static quantisation.

The range and the step size of each convolution's input and output are measured on real images. Weights and activations are
unsigned: on processors without VNNI instructions the products of signed integers saturate, and the file would give other results.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from advmoe.export.onnx import INPUT, check_extra, onnx_predictor, write_onnx
from advmoe.export.traceable import TraceableConv2d
from advmoe.files import drafted
from advmoe.quiet import quiet

BATCH = 256  # images in a calibration batch: large, so that nearly every batch has images for each expert
SEEN = 16  # an expert with fewer calibration images stays float32, because its range would be a guess


def write_int8(program: ExportedProgram, path: Path, facts: Mapping[str, str], pixels: Tensor) -> None:
    """Write a traced network as `advmoe.export.onnx.write_onnx` does, with int8 convolutions calibrated on `pixels` [n, C, H, W].

    Routers, the first convolution, the classifier, and experts with fewer than SEEN images stay float32. Raises UserError if a
    package of the extra `export` is missing.
    """
    check_extra()
    import onnx  # noqa: PLC0415 (an extra)

    with tempfile.TemporaryDirectory() as folder:
        float_file, int8_file = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        write_onnx(program, float_file, facts)
        counts = _expert_counts(float_file, pixels)
        names = _convolutions(onnx.load(float_file).graph, _moe_layers(program), counts)
        _quantise(float_file, int8_file, pixels, names)
        onnx.checker.check_model(int8_file, full_check=True)
        with drafted(path) as draft:
            draft.write_bytes(int8_file.read_bytes())


def _quantise(float_file: Path, int8_file: Path, pixels: Tensor, names: list[str]) -> None:
    from onnxruntime import quantization  # noqa: PLC0415 (an extra)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(pixels.split(BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    unsigned = quantization.QuantType.QUInt8
    with quiet():  # it prints advice about preprocessing
        quantization.quantize_static(
            float_file, int8_file, Reader(), quant_format=quantization.QuantFormat.QDQ, op_types_to_quantize=["Conv"],
            nodes_to_quantize=names, activation_type=unsigned, weight_type=unsigned,
        )  # fmt: skip


def _expert_counts(path: Path, pixels: Tensor) -> list[dict[int, int]]:
    """For each entry of a route, the number of images of each expert. Empty for a network without experts."""
    routes = [outputs[1] for outputs in map(onnx_predictor(path), pixels.split(BATCH)) if len(outputs) > 1]
    if not routes:
        return []
    return [dict(enumerate(torch.bincount(experts).tolist())) for experts in torch.cat(routes).T]


def _moe_layers(program: ExportedProgram) -> list[str]:
    """The names of the MoE layers, in the order of their calls."""
    modules = (module for node in program.graph.nodes for module in node.meta.get("nn_module_stack", {}).values())
    return list(dict.fromkeys(name for name, kind in modules if kind.endswith(f".{TraceableConv2d.__name__}")))


def _convolutions(graph: Any, moe_layers: list[str], counts: list[dict[int, int]]) -> list[str]:
    """The names of the nodes to quantise.

    The filters of a node are called `LAYER.weight`, or `LAYER.experts.E.weight` in the `moe_layers`. The experts of a layer are in
    order. E is not used, because experts with equal filters share one tensor in the file.
    """
    filters = {node.name: node.input[1] for node in graph.node if node.op_type == "Conv"}
    candidates = {name: weight for name, weight in filters.items() if not weight.startswith("network.router.")}
    rare = set()
    for index, layer in enumerate(moe_layers):
        experts = [name for name, weight in candidates.items() if weight.startswith(f"{layer}.experts.")]
        of_layer = counts[min(index, len(counts) - 1)]  # one choice may serve all layers
        rare |= {name for expert, name in enumerate(experts) if of_layer.get(expert, 0) < SEEN}
    return [name for name in list(candidates)[1:] if name not in rare]
