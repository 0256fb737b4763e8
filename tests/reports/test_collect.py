"""Which Records below a folder belong to which cell."""

import pytest
from records import changed, content, old_content, write

from advmoe.errors import UserError
from advmoe.evaluation.record_file import checked_record
from advmoe.reports.cell import cell_of
from advmoe.reports.collect import collect
from advmoe.reports.settings import departures, shared_settings


def seeds_and_methods(records):
    return [(record.method, record.seed) for record in records]


def test_records_of_runs_and_of_files_in_the_order_of_cells(tmp_path, caplog):
    write(tmp_path / "b/deep/record.json", content("advmoe", 1))
    write(tmp_path / "a/record.json", content("advmoe", 0))
    write(tmp_path / "results.json", [content("at_dense"), content("advmoe", model_scale=0.2)])
    write(tmp_path / "one.json", content("at_sparse"))
    records = collect(tmp_path)
    assert seeds_and_methods(records) == [("at_dense", 0), ("at_sparse", 0), ("advmoe", 0), ("advmoe", 0), ("advmoe", 1)]
    assert [record.config.model.model_scale for record in records[2:]] == [0.2, 0.5, 0.5]
    assert caplog.messages == []


def test_other_files_of_a_run_and_hidden_files_are_not_read(tmp_path, caplog):
    write(tmp_path / "run/record.json", content())
    for name in (
        "run/evaluation/shard-00000.json",
        "run/notes.json",
        "other/checkpoints/epoch.json",
        ".hidden.json",
        ".git/x.json",
    ):
        write(tmp_path / name, {})
    write(tmp_path / "run/config.yaml", "")
    write(tmp_path / "other/config.yaml", "")
    assert len(collect(tmp_path)) == 1
    assert caplog.messages == []


def test_a_record_hides_no_other_records(tmp_path, caplog):
    """A folder of Records is not a run, even if one of them is called as in a run's folder."""
    write(tmp_path / "record.json", content(seed=0))
    write(tmp_path / "copy.record.json", content(seed=1))
    write(tmp_path / "below/x.json", content(seed=2))
    assert [record.seed for record in collect(tmp_path)] == [0, 1, 2]
    assert caplog.messages == []


def test_old_records_are_read_beside_new_ones(tmp_path, caplog):
    write(tmp_path / "x.json", [old_content(seed=0), content(seed=1)])
    old, new = collect(tmp_path)
    assert (old.from_schema, old.history, old.gallery, new.from_schema) == (1, [], [], None)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"schema": 1', "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ({"figures": 1}, "holds no Record"),
        ([], "an empty list"),
        ("7", "holds no Record"),
        ({**content(), "schema": 99}, "schema 99"),
        ({**content(), "sa": "high"}, "sa"),
        ({**content(), "config": {}}, "config.model is missing"),
        ({**content(), "config": {**content()["config"], "model": "big"}}, "config.model is 'big', not an object"),
        ({**content(), "ra": {"50": [1]}}, "ra.50 is [1], not a number from 0 to 100"),
        ({**content(), "evaluation": {"checks": [{}]}}, "evaluation.images is missing"),
    ],
)
def test_a_file_without_a_record_is_one_warning_and_the_rest_is_read(tmp_path, caplog, value, message):
    write(tmp_path / "bad.json", value)
    write(tmp_path / "good.json", content())
    assert len(collect(tmp_path)) == 1
    (line,) = caplog.messages
    assert str(tmp_path / "bad.json") in line
    assert message in line
    assert "\n" not in line


def test_bad_entries_of_a_list_are_one_warning_and_the_others_are_read(tmp_path, caplog):
    write(tmp_path / "x.json", [content(), {"a": 1}, 5])
    assert len(collect(tmp_path)) == 1
    (line,) = caplog.messages
    assert "x.json, entry 2" in line
    assert "x.json, entry 3" in line


def test_unreadable_file_is_one_line(tmp_path, caplog):
    write(tmp_path / "good.json", content())
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    assert len(collect(tmp_path)) == 1
    (line,) = caplog.messages
    assert "gone.json: cannot be read (No such file or directory)" in line


@pytest.mark.parametrize(("tree", "seeds"), [(content(seed=3), [3]), ([content(seed=1), content(seed=0)], [0, 1])])
def test_one_file_is_read_alone(tmp_path, tree, seeds):
    """Also beside a run's Record: a second evaluation has its own file there."""
    write(tmp_path / "config.yaml", "")
    write(tmp_path / "record.json", content())
    write(tmp_path / "standard-500.record.json", tree)
    assert [record.seed for record in collect(tmp_path / "standard-500.record.json")] == seeds


def test_folder_without_a_record_is_refused(tmp_path):
    write(tmp_path / "bad.json", "{")
    with pytest.raises(UserError, match="holds no Record; advmoe evaluate RUN writes one"):
        collect(tmp_path)
    with pytest.raises(UserError, match="nowhere: does not exist"):
        collect(tmp_path / "nowhere")


def test_other_settings_in_one_cell_are_one_warning_and_the_newest_runs_count(tmp_path, caplog):
    old = changed("training", lr=0.05)
    write(tmp_path / "old.json", [old, {**old, "seed": 1}])
    write(tmp_path / "new.json", {**content(), "time": "2027-01-01T00:00:00+00:00"})
    (newest,) = collect(tmp_path)
    assert newest.config.training.lr == 0.1
    (line,) = caplog.messages
    assert "old.json: seed 0, 1 of advmoe, r 0.5, N 2, resnet18, fashion-mnist" in line
    assert "other settings than the run in" in line
    assert "new.json (training.lr: 0.05, not 0.1)" in line


def test_seeds_of_different_settings_are_never_averaged(tmp_path, caplog):
    """Not even if each seed occurs once."""
    write(tmp_path / "x.json", [changed("training", seed=0, lr=0.05), {**content(seed=1), "time": "2027-01-01T00:00:00+00:00"}])
    assert seeds_and_methods(collect(tmp_path)) == [("advmoe", 1)]
    assert len(caplog.messages) == 1


def test_networks_with_options_beyond_the_paper_are_networks_of_their_own(tmp_path, caplog):
    others = [changed("training", seed=seed, ema=0.99) for seed in (0, 1)]
    for one in others:
        one["config"]["model"]["activation"] = "silu"
    write(tmp_path / "all.json", [content("advmoe", 0), content("advmoe", 1), *others])
    records = collect(tmp_path)
    assert caplog.messages == []
    assert [cell_of(record).ingredients for record in records] == ["", "", *["activation silu, ema 0.99"] * 2]
    plain, other = cell_of(records[0]), cell_of(records[-1])
    assert (plain.is_of_the_paper, other.is_of_the_paper) == (True, False)
    assert (plain.setting, shared_settings(records[0])) == (other.setting, shared_settings(records[-1]))
    assert other.label == "advmoe, activation silu, ema 0.99"


def test_where_a_run_is_computed_does_not_separate_its_seeds(tmp_path, caplog):
    write(tmp_path / "a.json", changed("runtime", save_minutes=5.0, deterministic=True, compile="inductor"))
    write(tmp_path / "b.json", changed("training", seed=1, on_nonfinite="restore"))
    write(tmp_path / "c.json", content("advmoe", 2))
    assert [record.seed for record in collect(tmp_path)] == [0, 1, 2]
    assert caplog.messages == []


def test_files_of_a_networks_evaluation_are_not_read(tmp_path, caplog):
    write(tmp_path / "net.record.json", content())
    write(tmp_path / "net.gallery.json", [])
    for name in ("net.evaluation", "net.evaluation-cifar10.1"):
        write(tmp_path / name / "key.json", {})
        write(tmp_path / name / "shard-00000.json", {})
    assert len(collect(tmp_path)) == 1
    assert caplog.messages == []


def test_other_data_of_the_same_name_is_another_setting(tmp_path, caplog):
    write(tmp_path / "x.json", [content(fingerprint="other"), {**content(seed=1), "time": "2027-01-01T00:00:00+00:00"}])
    assert len(collect(tmp_path)) == 1
    assert "fingerprint: other, not" in caplog.messages[0]


def test_a_seed_run_twice_is_listed_once(tmp_path, caplog):
    newer = {**content(sa=70.0), "time": "2027-01-01T00:00:00+00:00"}
    newer["evaluation"]["figures"]["sa"] = 70.0
    write(tmp_path / "a.json", newer)
    write(tmp_path / "b.json", content())
    (newest,) = collect(tmp_path)
    assert newest.sa == 70.0
    (line,) = caplog.messages
    assert f"{tmp_path}/b.json: seed 0 of" in line
    assert f"{tmp_path}/a.json holds a newer run of it" in line


def test_copies_of_a_record_count_once(tmp_path, caplog):
    write(tmp_path / "a.json", [content(), content()])
    write(tmp_path / "run/record.json", content())
    assert len(collect(tmp_path)) == 1
    assert caplog.messages == []


def test_runs_of_a_method_that_is_not_registered_here_are_not_averaged(tmp_path, caplog):
    for number, fields in enumerate(({"num_experts": 2}, {"num_experts": 4}, {"num_experts": 2, "model_scale": 0.2})):
        write(tmp_path / f"{number}/record.json", content("advmoe", number, **fields) | {"method": "mine"})
    records = collect(tmp_path)
    assert len({cell_of(record) for record in records}) == 3
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("method 'mine' is not registered here")


def test_seeds_under_attacks_with_other_settings_are_not_averaged(tmp_path, caplog):
    newer = {**content(seed=1, attack_precision="bfloat16"), "time": "2027-01-01T00:00:00+00:00"}
    write(tmp_path / "x.json", [content(), newer])
    (record_of_newer,) = collect(tmp_path)
    assert record_of_newer.seed == 1
    assert "(attack gradients: float32, not bfloat16)" in caplog.messages[0]
    assert departures(record_of_newer) == ("attack gradients bfloat16 (float32)",)


def test_a_run_that_was_evaluated_before_its_end_is_not_compared_with_finished_ones(tmp_path, caplog):
    started = content(seed=2, history=content()["history"][:4])
    write(tmp_path / "x.json", [content(), content(seed=1), started])
    assert seeds_and_methods(collect(tmp_path)) == [("advmoe", 0), ("advmoe", 1)]
    (line,) = caplog.messages
    assert "seed 2 of advmoe" in line
    assert "(epochs trained: 4 of 6, not all)" in line
    assert departures(checked_record(started, "here")) == ("epochs trained 4 of 6 (all)",)
    one_phase = content("at_sparse", history=content()["history"])
    assert departures(checked_record(one_phase, "here")) == ("epochs trained 6 of 12 (all)",)
