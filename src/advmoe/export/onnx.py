"""Write a traced network as an ONNX file, and run such files with ONNX Runtime."""

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from advmoe.errors import UserError
from advmoe.export.compare import Predictor
from advmoe.files import drafted
from advmoe.quiet import quiet

NEEDED = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUTS = "pixels", ("logits", "routes")
ROWS_AXIS = "rows_axis"  # name of a constant in the graph


def check_extra() -> None:
    """Raises UserError, with the pip command, if a package of the extra `export` is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}, not installed here: pip install 'advmoe[export]'")


def write_onnx(program: ExportedProgram, path: Path, facts: Mapping[str, str]) -> None:
    """Write a traced network as one ONNX file with `facts` as its metadata, checked by onnx.checker.

    Input `pixels` [batch, C, H, W]; outputs `logits` [batch, classes] and, for an MoE network, `routes` [batch, L] int64. Raises
    UserError if a package of the extra `export` is missing.
    """
    check_extra()
    import onnx  # noqa: PLC0415 (an extra)

    model = _converted(program)
    _name_batch(model)
    onnx.helper.set_model_props(model, dict(facts))
    onnx.checker.check_model(model, full_check=True)
    with drafted(path) as draft:
        onnx.save(model, draft)


def onnx_predictor(path: Path, threads: int = 0) -> Predictor:
    """A function that runs an ONNX file on the CPU with ONNX Runtime, in `threads` threads (0: ONNX Runtime chooses).

    It maps pixels [B, C, H, W] to logits [B, classes] and, if routed, routes [B, L]. Raises UserError if the file cannot be read.
    """
    check_extra()
    import onnxruntime  # noqa: PLC0415 (an extra)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads sleep between calls
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises many exception classes
        raise UserError(f"{path}: not an ONNX file that ONNX Runtime reads ({str(error).splitlines()[0]})") from None

    def predict(pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(output) for output in session.run(None, {INPUT: pixels.numpy()}))

    return predict


def _converted(program: ExportedProgram) -> Any:
    """The graph as an onnx.ModelProto. The names of source files that torch adds to the nodes are removed."""
    names = OUTPUTS[: len(program.graph_signature.user_outputs)]
    with quiet("torch.onnx"), warnings.catch_warnings(action="ignore"):  # warnings about packages that are not needed here
        converted = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[INPUT], output_names=list(names),
            custom_translation_table=_translations(),
        )  # fmt: skip
    assert converted is not None
    model = converted.model_proto
    graph = model.graph
    _squeeze_rows(graph)
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
    return model


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations with fewer operators than the exporter's: at batch 1 many small ones cost as much as the convolutions."""
    from onnxscript import opset20 as op  # noqa: PLC0415 (an extra)

    def index_select(x: Any, dim: int, index: Any) -> Any:
        return op.Gather(x, index, axis=dim)

    def sort(x: Any, dim: int = -1, descending: bool = False) -> Any:
        return op.TopK(x, op.Shape(x), axis=dim, largest=int(descending), sorted=1)  # equal values keep their order

    def stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        return sort(x, dim, descending)

    aten = torch.ops.aten
    return {aten.index_select.default: index_select, aten.sort.default: sort, aten.sort.stable: stable_sort}


def _squeeze_rows(graph: Any) -> None:
    """Replace the Transpose and Reshape that the exporter adds after NonZero of a vector, [1, n], by one Squeeze."""
    from onnx import helper, numpy_helper  # noqa: PLC0415 (an extra)

    producers = {node.output[0]: node for node in graph.node}
    for node in list(graph.node):
        transpose = producers.get(node.input[0]) if node.op_type == "Reshape" else None
        nonzero = producers.get(transpose.input[0]) if transpose is not None and transpose.op_type == "Transpose" else None
        if transpose is not None and nonzero is not None and nonzero.op_type == "NonZero":
            node.CopyFrom(helper.make_node("Squeeze", [nonzero.output[0], ROWS_AXIS], node.output, node.name))
            graph.node.remove(transpose)
    graph.initializer.append(numpy_helper.from_array(np.array([0]), ROWS_AXIS))
    used = {name for node in graph.node for name in node.input}
    for constant in [constant for constant in graph.initializer if constant.name not in used]:
        graph.initializer.remove(constant)


def _name_batch(model: Any) -> None:
    """Name the first dimension of the input and outputs `batch`."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
