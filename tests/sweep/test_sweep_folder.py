"""A sweep's plan: several sweeps may add their runs to it."""

import threading
import time

from filelock import FileLock

from advmoe.sweep.folder import LOCK, PLAN, read_plan, write_plan
from advmoe.sweep.grid import read_sweep
from advmoe.sweep.plan import plan


def test_sweeps_that_add_to_a_plan_at_the_same_time_take_turns(tmp_path):
    first, second, *_ = plan(read_sweep("a1"))
    with FileLock(tmp_path / LOCK):
        thread = threading.Thread(target=write_plan, args=(tmp_path, "a1", [second], ["quick"]))
        thread.start()
        time.sleep(0.2)
        assert not (tmp_path / PLAN).exists()
    thread.join()
    write_plan(tmp_path, "a1", [first], ["quick"])
    assert set(read_plan(tmp_path / PLAN).runs) == {first.name, second.name}
