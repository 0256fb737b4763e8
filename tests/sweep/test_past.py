"""What earlier runs took, read from their folders."""

import json
from dataclasses import replace

import pytest

from advmoe.config import dump_yaml
from advmoe.sweep.past import Past, alike, past


def left_by(folder, config, epochs, record=None):
    """A run whose epochs took so many seconds to train, and one to validate."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(config))
    rows = [{"epoch": number, "train_seconds": seconds, "validate_seconds": 1.0} for number, seconds in enumerate(epochs, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if record is not None:
        (folder / "record.json").write_text(json.dumps(record))
    return folder


def record(seconds, attacks):
    return {
        "evaluate_seconds": seconds,
        "evaluation": {"attacks": {name: {"seconds": own} for name, own in attacks.items()}, "left_out": {"reroute": "why"}},
    }


def test_epochs_are_told_by_phase_and_over_seeds(tiny, tmp_path):
    config = tiny("at_sparse")
    folders = [
        left_by(tmp_path / "a", config, [3.0, 3.0, 3.0, 9.0]),
        left_by(tmp_path / "b", replace(config, seed=1), [5.0, 5.0, 5.0]),
        left_by(tmp_path / "c", tiny("advmoe"), [70.0]),
        tmp_path / "not begun",
    ]
    found = past(folders, ["pgd_10"])
    assert found == {alike(config): Past({0: 5.0, 1: 10.0}), alike(tiny("advmoe")): Past({0: 71.0})}


def test_evaluations_by_other_attacks_tell_nothing(tiny, tmp_path):
    config, preset = tiny(), ["pgd_10", "reroute"]
    whole = left_by(tmp_path / "a", config, [1.0], record(8.0, {"pgd_10": 5.0}))
    stopped = left_by(tmp_path / "b", config, [1.0], record(2.0, {"pgd_10": 4.0}))
    other = left_by(tmp_path / "c", config, [1.0], record(900.0, {"pgd_10": 5.0, "pgd_50": 800.0}))
    assert past([whole, stopped, other], preset)[alike(config)].evaluation == pytest.approx(6.0)
    assert past([other], preset)[alike(config)].evaluation is None


def test_what_is_no_record_tells_nothing(tiny, tmp_path):
    folder = left_by(tmp_path / "a", tiny(), [1.0], {"evaluation": 3})
    assert past([folder], "quick")[alike(tiny())].evaluation is None


def test_threads_part_runs_and_places_do_not(tiny):
    assert alike(tiny(threads=1)) != alike(tiny(threads=2))
    assert alike(tiny(device="cpu", data_dir="here", epochs=4, seed=2)) == alike(tiny())
