import torch

from advmoe.benchmark import timing
from advmoe.benchmark.timing import stopwatch, timed

CPU = torch.device("cpu")


def test_calls_take_turns_and_the_first_round_does_not_count(monkeypatch):
    now, order = [0.0], []

    def call(name, *durations):
        remaining = iter(durations)

        def run():
            order.append(name)
            now[0] += next(remaining)

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    times = timed({"a": call("a", 100, 1, 2), "b": call("b", 100, 3, 4)}, 2, CPU)
    assert times == {"a": [1, 2], "b": [3, 4]}
    assert order == ["a", "b"] * 3


def test_the_stopwatch_waits_for_cuda_before_and_after(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", order.append)
    device = torch.device("cuda", 0)
    assert stopwatch(lambda: order.append("call"), device) >= 0
    assert order == [device, "call", device]
