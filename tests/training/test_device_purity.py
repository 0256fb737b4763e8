"""An iteration reads values of the device once, and never mixes devices.

It runs on the meta device. Tensors there have no values, so every read by the host raises an error, and so does every operator
that gets a tensor of the CPU.
"""

from contextlib import nullcontext

import pytest
import torch
from three_iterations import CASES, SPEC, config

from advmoe.moe import MoEKind
from advmoe.training.ema import Ema
from advmoe.training.health import Watch
from advmoe.training.losses import LOSSES
from advmoe.training.methods import LEVELS, METHODS
from advmoe.training.start import network
from advmoe.training.steps import TrainState

STATIC = ("wide", "grouped")  # triton has static shapes too, but its kernels need a device with values
# The only read allowed is Watch.check at the end of an iteration. The fused optimizer needs no read before its step.
MORE_CASES = {
    "advmoe, adr": ("advmoe", {}, {"ema": 0.9, "soft_labels": "adr"}),
    "advmoe, runner-up": ("advmoe", {}, {"runner_up_consistency": 1.0, "weight_attack_gate": "alternate"}),
    "at_moe, scaled gate": ("at_moe", {}, {"router_gate": "scaled", "router_attack_gate": "scaled"}),
}
ALL_CASES = CASES | MORE_CASES


class Draws:
    """Noise without a generator: torch has none on the meta device."""

    batch = None

    def uniform(self, x):
        return torch.empty_like(x).uniform_(-1, 1)

    normal = uniform


class Fused(torch.optim.SGD):
    """Reads nothing before its step, like the fused optimizer on CUDA."""

    def __init__(self, parameters):
        super().__init__(parameters, 0.1, momentum=0.9)
        self.defaults["fused"] = True

    def step(self):
        del self.found_inf  # only the fused kernel uses it
        super().step()


def on_meta(case, dispatch, phase):
    """The state of a run on the meta device, and batches for its levels."""
    settings = config(*ALL_CASES[case])
    model = network(settings, SPEC)
    model.set_dispatch(dispatch)
    model = model.to("meta").eval()
    optimizers = {level: Fused(LEVELS[level](model)) for level in phase.levels}
    loss = LOSSES[METHODS[settings.method].loss or settings.training.loss]
    ema = Ema(model, settings.training.ema) if settings.training.ema else None
    batch = torch.empty(6, *SPEC.shape, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    state = TrainState(model, settings, loss, optimizers, Draws(), None, 1.0, ema=ema)
    return state, dict.fromkeys(phase.levels, batch)


def cases():
    for case, (method, model, _) in ALL_CASES.items():
        settings = config(method, model, {})
        routed = isinstance(METHODS[method].kind(settings.model), MoEKind)
        for dispatch in STATIC if routed and case in METHODS else STATIC[:1]:
            yield pytest.param(case, dispatch, id=f"{case}, {dispatch}")


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    """torch has no autocast on the meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **named: nullcontext())


@pytest.mark.parametrize(("case", "dispatch"), list(cases()))
def test_an_iteration_reads_once(case, dispatch, monkeypatch):
    reads = []

    def read_peaks(watch):
        reads.append(len(watch.peaks))
        watch.names, watch.peaks = [], []

    monkeypatch.setattr(Watch, "check", read_peaks)
    for phase in METHODS[ALL_CASES[case][0]].phases:
        state, batches = on_meta(case, dispatch, phase)
        reads.clear()
        metrics = phase.step(state, batches)
        assert len(reads) == 1
        assert reads[0] > 0
        assert all(value.device.type == "meta" for value in metrics.values())


@pytest.mark.parametrize(("fault", "message"), [("split", "Meta tensors"), ("cpu", "not on the expected device meta")])
def test_further_reads_and_mixed_devices_raise_errors(fault, message, monkeypatch):
    monkeypatch.setattr(Watch, "check", lambda watch: None)  # the one read that is allowed
    (phase,) = METHODS["advmoe"].phases
    state, batches = on_meta("advmoe", "split" if fault == "split" else "wide", phase)
    if fault == "cpu":
        state.model.moe_layers()[0].router.mean = torch.zeros(2)
    with pytest.raises(RuntimeError, match=message):
        phase.step(state, batches)
