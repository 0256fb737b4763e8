import torch

from advmoe.benchmark import timing
from advmoe.benchmark.timing import stopwatch, timed

CPU = torch.device("cpu")


def test_calls_take_turns_and_warm_up_rounds_do_not_count(monkeypatch):
    now, order = [0.0], []

    def call(name, *durations):
        remaining = iter(durations)

        def run():
            order.append(name)
            now[0] += next(remaining)

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    calls = {"a": call("a", 100, 50, 1, 2, 3), "b": call("b", 100, 50, 4, 5, 6)}
    assert timed(calls, 2, CPU, warm_up=2) == {"a": [1, 2], "b": [4, 5]}
    assert order == ["a", "b"] * 4
    assert timed({"a": call("a", 100, 1)}, 1, CPU) == {"a": [1]}


def test_the_stopwatch_waits_for_cuda_before_and_after(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", order.append)
    device = torch.device("cuda", 0)
    assert stopwatch(lambda: order.append("call"), device) >= 0
    assert order == [device, "call", device]
