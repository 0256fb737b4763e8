"""The Triton kernels against a loop over images. They run by Triton's interpreter, which must be chosen before Triton is
imported, so in a process of its own: this file, which prints what it found."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from advmoe.errors import UserError
from advmoe.moe.experts import FilterBank, windows

TOLERANCES = {"float64": 1e-12, "float32": 1e-4, "float16": 2e-2}  # of values of about 1


@dataclass(frozen=True)
class Case:
    """A layer and a batch; `experts` as given, else at random."""

    bank: str = "backbone"
    num_experts: int = 2
    out_channels: int = 9
    width: int = 4
    channels: int = 5
    kernel: int = 3
    stride: int = 1
    size: tuple[int, int] = (3, 4)
    batch: int = 4
    experts: tuple[int, ...] | None = None
    layout: str = "contiguous_format"
    dtype: str = "float64"
    autocast: bool = False
    bias: bool = True
    programs: int = 40  # so few that a program takes several tiles even here


CASES = {
    "disjoint windows": Case("disjoint", size=(5, 6)),
    "overlapping windows": Case(num_experts=3, width=6, kernel=1),
    "three experts share a filter": Case(num_experts=4, width=7, experts=(3, 1, 2, 0), kernel=1),
    "stride 2": Case(width=6, stride=2, size=(5, 7)),
    "stride 2, even size": Case(stride=2, size=(6, 4)),
    "stride 2, one pixel filters": Case("disjoint", 3, kernel=1, stride=2),
    "stride 3": Case(stride=3, size=(7, 5)),
    "channels last": Case(layout="channels_last"),
    "channels last, stride 2": Case(layout="channels_last", stride=2, size=(5, 6)),
    "one image": Case(batch=1),
    "one expert": Case(num_experts=1),
    "more experts than images": Case("disjoint", 8, batch=3, kernel=1),
    "experts that nobody chose": Case(num_experts=4, width=3, experts=(2, 2, 2, 2), kernel=1),
    "more images than a tile takes": Case("disjoint", 2, kernel=1, size=(2, 3), batch=21, channels=3, width=2),
    "more pixels than a tile takes": Case(kernel=1, size=(9, 10), batch=3, channels=2, width=2, experts=(0, 1, 0)),
    "large tiles": Case(kernel=1, size=(9, 10), batch=3, channels=2, width=2, experts=(0, 1, 0), programs=1),
    "more channels than a block takes": Case("disjoint", 2, kernel=1, size=(2, 2), batch=3, channels=37, width=35),
    "no bias": Case(kernel=1, bias=False),
    "float32": Case(kernel=1, dtype="float32"),
    "float16": Case(dtype="float16", layout="channels_last", stride=2),
    "autocast to float16": Case(kernel=1, dtype="float32", autocast=True),
    "no image": Case(batch=0),
}
WAITS = {"_local_scalar_dense", "nonzero", "bincount", "item", "unique"}  # what makes the host wait for a CUDA device


@pytest.fixture(scope="module")
def found():
    """Of each case, the largest errors of y and of every gradient, and whether y has x's memory format; and what was called."""
    pytest.importorskip("triton", minversion="3.9", reason="needs Triton; before 3.9 its interpreter fails with NumPy 2.4")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_a_loop_over_images_in_values_and_every_gradient(found, name):
    errors, tolerance = found["errors"][name], TOLERANCES["float16" if CASES[name].autocast else CASES[name].dtype]
    assert set(errors) == {"y", "x", "filters", "one_hot", *(["bias"] if CASES[name].bias else [])}
    assert max(errors.values()) <= tolerance, errors


def test_y_has_the_memory_format_of_x(found):
    assert found["formats_kept"] == list(CASES)


def test_asks_for_no_gradient_that_is_not_wanted(found):
    assert "index_add_" in found["calls"]
    assert "index_add_" not in found["attack"]  # which gathers the filters' gradients


def test_nothing_waits_for_the_device(found):
    assert "new_empty" in found["calls"]
    assert not WAITS & set(found["calls"])


def test_bfloat16_on_the_cpu_is_refused_in_one_line(found):
    assert found["bfloat16"] == "dispatch 'triton' on the CPU runs in Triton's interpreter, which has no bfloat16; it has float32"


def test_float32_uses_tf32_as_cudnns_convolutions_do(found):
    assert found["precisions"] == {"tf32": "tf32", "ieee": "ieee", "none": "ieee"}


# The process


def layer(case):
    """x, experts, one-hot and filters of a case, all but the experts with gradients."""
    random = torch.Generator().manual_seed(case.num_experts)
    dtype = getattr(torch, case.dtype)

    def noise(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    starts, _, size = windows(case.bank, case.num_experts, case.out_channels, case.width)
    x = noise(case.batch, case.channels, *case.size).contiguous(memory_format=getattr(torch, case.layout)).requires_grad_()
    filters = (noise(size, case.channels, case.kernel, case.kernel) / (case.channels * case.kernel**2) ** 0.5).requires_grad_()
    bias = noise(case.num_experts, case.width).requires_grad_() if case.bias else None
    experts = torch.randint(0, case.num_experts, (case.batch,), generator=random)
    if case.experts is not None:
        experts = torch.tensor(case.experts)
    one_hot = torch.nn.functional.one_hot(experts, case.num_experts).to(dtype).requires_grad_()
    return x, experts, one_hot, FilterBank(filters, starts, case.width, case.stride, bias)


def loop(x, bank, one_hot):
    """Every expert on one image after the other, weighed by the one-hot."""
    rows = []
    for image, weights in zip(x, one_hot, strict=True):
        parts = [weight * bank.convolve(image[None], e) for e, weight in enumerate(weights)]
        rows.append(sum(parts[1:], parts[0]))
    return torch.cat(rows) if rows else bank.convolve(x, 0) + 0 * one_hot.sum()


def gradients(y, probe, wanted):
    given = torch.autograd.grad((y * probe).sum(), list(wanted.values()), allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(wanted.items(), given, strict=True)}


def compared(case, module):
    """The largest errors of y and of each gradient relative to the largest true value, at least 1."""
    x, experts, one_hot, bank = layer(case)
    module.PROGRAMS = case.programs
    with torch.autocast("cpu", torch.float16, enabled=case.autocast):
        y = module.routed_conv2d(x, bank, experts, one_hot)
    slow = loop(x, bank, one_hot)
    probe = torch.randn(slow.shape, generator=torch.Generator().manual_seed(0), dtype=slow.dtype)
    wanted = {"x": x, "filters": bank.filters, "one_hot": one_hot} | ({"bias": bank.bias} if case.bias else {})
    pairs = {"y": (y, slow)}
    ours, true = gradients(y, probe.to(y.dtype), wanted), gradients(slow, probe, wanted)
    pairs |= {name: (ours[name], true[name]) for name in wanted}
    errors = {name: error(a.detach(), b.detach()) for name, (a, b) in pairs.items()}
    return errors, y.is_contiguous(memory_format=getattr(torch, case.layout))


def error(found, true):
    return float((found - true).abs().max() / true.abs().max().clamp(min=1)) if true.numel() else 0.0


class Calls(TorchDispatchMode):
    """Names of all that torch is asked for."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def report(module):
    answers = {name: compared(case, module) for name, case in CASES.items()}
    conv = module.routed_conv2d
    x, experts, one_hot, bank = layer(Case())
    conv(x, bank, experts, one_hot)
    with Calls() as calls:
        y = conv(x, bank, experts, one_hot)
        y.sum().backward()
    attacked = FilterBank(bank.filters.detach(), bank.starts, bank.width, bank.stride)
    leaf = x.detach().requires_grad_()
    with Calls() as attack:
        conv(leaf, attacked, experts, None).sum().backward()
    try:
        refused = str(conv(x.bfloat16(), bank, experts, None).dtype)
    except UserError as error:
        refused = str(error)
    precisions = {}
    for precision in ("tf32", "ieee", "none"):
        torch.backends.cudnn.conv.fp32_precision = precision
        precisions[precision] = module._layer(x.float(), bank.filters.float(), bank).numbers["PRECISION"]
    return {
        "precisions": precisions,
        "errors": {name: errors for name, (errors, _) in answers.items()},
        "formats_kept": [name for name, (_, kept) in answers.items() if kept],
        "calls": sorted(calls.names),
        "attack": sorted(attack.names),
        "bfloat16": refused,
    }


if __name__ == "__main__":
    from advmoe.moe.dispatch import triton_conv

    print(json.dumps(report(triton_conv)))
