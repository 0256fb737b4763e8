"""Records: their content, reading and writing, and their RobustBench form."""

import functools
import json
import os
from pathlib import Path

import pytest
import torch
from refusal import refusal
from small_backbone import ROUTED

from advmoe import provenance as origin
from advmoe.config import DataConfig, RunConfig, to_dict
from advmoe.errors import UserError
from advmoe.evaluation import make_record as make_record_file
from advmoe.evaluation.cost import Cost
from advmoe.evaluation.make_record import Measured, Trained, code_of, evaluate_run, make_record
from advmoe.evaluation.record import HistoryRow, Record, RecordedCode
from advmoe.evaluation.record_config import RecordedConfig
from advmoe.evaluation.record_evaluation import AttackTotals, Check
from advmoe.evaluation.record_file import checked_record, read_record, write_record
from advmoe.evaluation.record_snapshot import EpsilonCurve, Layer
from advmoe.evaluation.results import Evaluation
from advmoe.evaluation.robustbench import model_info
from advmoe.evaluation.snapshot import Snapshot
from advmoe.evaluation.target import EvaluationOptions
from advmoe.models import build_model
from advmoe.models.digest import weights_digest
from advmoe.moe import MoEKind
from advmoe.provenance import code
from advmoe.runs.evaluate import evaluate_folder
from advmoe.training.loop import train

ROWS = [
    {"epoch": 1, "phase": 1, "val_sa": 50.0, "val_ra": 30.0, "loss": 1.5, "lr": 0.1, "train_seconds": 2.0, "iterations": 3},
    {
        "epoch": 2, "phase": 1, "val_sa": 60.0, "val_ra": 35.0, "loss": 1.2, "lr": 0.05, "train_seconds": 1.5, "iterations": 3,
        "router_loss": 0.4, "load": [[0.5, 0.5]],
    },
]  # fmt: skip
HISTORY = [HistoryRow.model_validate(row) for row in ROWS]
SNAPSHOT = Snapshot(
    [Layer(name="a", in_channels=1, width=2, size=[28, 28], experts=2)], [[[1, 2]]],
    EpsilonCurve(attack="pgd_10", images=8, epsilons=[0.0], ra=[60.0]),
)  # fmt: skip
RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture
def record(tiny, splits):
    """record(complete, unreliable, epsilon, figures): a Record of an invented evaluation."""

    def make(complete=True, unreliable=False, epsilon=8 / 255, **figures):
        checks = [Check(5, "RA-AA near RA-worst", "fail" if unreliable else "pass", "")]
        evaluation = Evaluation(
            62.5, {"ra_10": 50.0, "ra_50": 37.5, **figures}, 25.0, complete, {}, None, checks, list(range(8)),
            [0, 1, 2, 3, 4], {"pgd_10": [0], "pgd_50": [0, 1], "reroute": [2]}, {}, [0, 1, 2], {},
        )  # fmt: skip
        measured = Measured(evaluation, SNAPSHOT, Cost(100, 0.25, 0.3), Cost(400, 1.0, 1.0), weights="0" * 64, seconds=2.0)
        trained = Trained(tiny(data_dir="somewhere"), "first", 2, HISTORY, train_seconds=3.5)
        return make_record(trained, splits, EvaluationOptions(epsilon, seed=7), measured)

    return make


def test_ra_worst_has_its_full_name_only_in_a_complete_evaluation(record):
    assert record(ra_aa=30.0).ra_worst == 25.0
    assert record(ra_aa=30.0).ra_worst_quick is None
    quick = record(complete=False)
    assert quick.ra_worst_quick == quick.evaluation.figures["ra_worst_quick"] == quick.worst == 25.0
    assert quick.ra_worst is None
    assert not {"ra_worst", "ra_aa"} & {*quick.to_json(), *quick.evaluation.figures}


def test_a_record_has_figures_flags_and_provenance(record):
    result = record(ra_aa=30.0, ra_50x10=1.0)
    assert result.ra == {"10": 50.0, "50": 37.5}
    assert result.ra_aa == 30.0
    assert result.evaluation.flags == "00011000"
    assert (result.attack_seed, result.norm, result.epsilon) == (7, "Linf", 8 / 255)
    assert result.reduction == pytest.approx(75)
    assert {"commit", "versions", "hardware", "time", "config", "fingerprint"} <= set(result.to_json())
    assert result.evaluation.intervals["sa"] == pytest.approx([30.57, 86.32], abs=0.01)


def test_robustbench_fields(record):
    info = model_info(record(ra_aa=31.415))
    assert info["eps"] == "8/255"
    assert (info["clean_acc"], info["reported"], info["autoattack_acc"], info["external"]) == ("62.50", "31.41", "31.41", "25.00")
    assert info["unreliable"] is False
    assert set(info) == {
        "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
        "clean_acc", "reported", "autoattack_acc", "external", "unreliable",
    }  # fmt: skip
    assert model_info(record(ra_aa=30.0, unreliable=True))["unreliable"] is True


def test_robustbench_names_generated_images_in_a_footnote(record):
    """Its entries of networks that were trained on generated images have no additional data."""
    generated = record(ra_aa=30.0)
    generated.config = RecordedConfig.model_validate(
        to_dict(RunConfig(method="at_dense", data=DataConfig(dataset="cifar10", generated="images.npz")))
    )
    info = model_info(generated)
    assert info["additional_data"] is False
    assert info["footnote"] == "It uses additional synthetic images in training."


def test_robustbench_fields_of_attacks_that_did_not_run_are_missing(record):
    result = record(complete=False)
    result.evaluation.attacks = {name: AttackTotals(attacked=5, broken=1, seconds=1.0) for name in ("pgd_10", "apgd_ce")}
    info = model_info(result)
    assert not {"autoattack_acc", "reported", "unreliable"} & set(info)
    assert info["external"] == "25.00"
    assert info["footnote"] == "external is the accuracy under pgd_10, apgd_ce only."


def test_robustbench_says_that_autoattack_is_unreliable_without_a_complete_evaluation(record):
    info = model_info(record(ra_aa=30.0, complete=False, unreliable=True))
    assert (info["autoattack_acc"], info["external"], info["unreliable"]) == ("30.00", "25.00", True)


@pytest.mark.parametrize(("epsilon", "text"), [(4 / 255, "4/255"), (0.1, "0.1"), (0.5, "0.5"), (1.0, "255/255")])
def test_epsilon_as_a_fraction(record, epsilon, text):
    assert model_info(record(epsilon=epsilon))["eps"] == text


def test_the_history_and_the_runs_name_are_in_the_record(record):
    result = record()
    assert result.to_json()["schema"] == 3
    assert result.run == "first"
    assert result.history[0] == HistoryRow(epoch=1, phase=1, val_sa=50.0, val_ra=30.0, loss=1.5, lr=0.1)
    assert (result.history[1].router_loss, result.history[1].load) == (0.4, [[0.5, 0.5]])
    assert result.train_seconds == 3.5
    assert result.classes[0] == "T-shirt"


@pytest.fixture(scope="module")
def evaluated(tiny, splits):
    """evaluated(**options): a Record of an untrained network."""
    torch.manual_seed(0)
    model = build_model(tiny().model, MoEKind(0.5), splits.spec).eval()

    def make(**options):
        plan = EvaluationOptions(**{"epsilon": tiny().attack.epsilon, "preset": ("pgd_10",), **options})
        return evaluate_run(model, Trained(tiny(), "run", 1, HISTORY), splits, Cost(1, 1.0, 1.0), plan)

    return make


def test_evaluating_at_another_epsilon_does_not_change_the_runs_configuration(evaluated):
    record = evaluated(epsilon=0.02, seed=3)
    assert (record.epsilon, record.config.attack.epsilon) == (0.02, 0.1)
    assert (record.attack_seed, record.test_images, record.attack_precision) == (3, 20, "float32")
    assert record.epsilon_curve.epsilons == [0.0, 0.02]
    assert record.epsilon_curve.ra == [record.sa, record.ra["10"]]


def test_the_commit_of_a_record_is_that_of_the_beginning(evaluated, monkeypatch):
    """The attacks take hours, and the checkout may change meanwhile."""
    checkout = ["a"]
    monkeypatch.setattr(origin, "_commit", functools.cache(lambda: checkout[-1]))
    evaluate = make_record_file.evaluate_claimed

    def evaluate_during_a_commit(*arguments):
        checkout.append("b")
        return evaluate(*arguments)

    monkeypatch.setattr(make_record_file, "evaluate_claimed", evaluate_during_a_commit)
    assert evaluated().commit == "a"


def test_an_evaluated_run_is_read_back_as_it_was_written(evaluated, tmp_path):
    record = evaluated(bf16_search=True)
    assert record.attack_precision == "bfloat16"
    assert len(record.layers) == len(record.load_by_class) == ROUTED
    assert len(record.gallery) == 8
    write_record(tmp_path / "record.json", record)
    assert read_record(tmp_path / "record.json") == record


def test_the_record_of_a_folder_has_its_name_and_full_history(tiny, splits, tmp_path, recorder, monkeypatch):
    config = tiny("at_moe", epochs=2)
    train(config, splits, tmp_path / "mine", recorder)
    (tmp_path / "mine/inside").mkdir()
    monkeypatch.chdir(tmp_path / "mine/inside")
    record = evaluate_folder(Path(".."), config, splits, EvaluationOptions(0.1, preset=("pgd_10",)))
    assert record.run == "mine"
    assert [one.model_dump() for one in record.trained_by] == [code()]
    assert [row.epoch for row in record.history] == [1, 2]
    assert record.epoch == max((1, 2), key=lambda epoch: (recorder.rows[epoch - 1]["score"], -epoch))
    assert record.train_seconds == sum(row["train_seconds"] for row in recorder.rows)
    assert {"epoch", "phase", "val_sa", "val_ra", "loss", "lr", "load"} <= record.history[0].model_fields_set
    assert (tmp_path / "mine/evaluation/shard-00000.json").exists()


def test_the_code_that_trained_a_network_is_listed_in_order():
    """A run that other code resumed has two; epochs of a version that did not store it are unknown."""
    first, second = {"advmoe": "0.1.0", "commit": "1a2b"}, {"advmoe": "0.1.0", "commit": "3c4d"}
    assert code_of([first, first, second]) == [RecordedCode(**first), RecordedCode(**second)]
    assert code_of([{}, second]) == [RecordedCode(), RecordedCode(**second)]
    assert code_of([{}, {}]) == []


def as_schema_2(content):
    """A Record's JSON in the form of schema 2."""
    evaluation = {name: value for name, value in content["evaluation"].items() if name != "figures"}
    evaluation |= content["evaluation"]["figures"] | {"pictures": evaluation.pop("images")}
    old = content | {"schema": 2, "train_pictures": content["train_images"], "test_pictures": content["test_images"]}
    return {name: old[name] for name in old if name not in ("train_images", "test_images", "weights")} | {"evaluation": evaluation}


def test_records_of_older_schemas_are_read_without_their_missing_fields(record):
    current = record()
    second = as_schema_2(current.to_json())
    from_second = checked_record(second, "here")
    assert from_second == current.model_copy(update={"from_schema": 2, "weights": None})
    added = ("run", "history", "classes", "layers", "load_by_class", "epsilon_curve", "gallery")
    from_first = checked_record({name: value for name, value in second.items() if name not in added} | {"schema": 1}, "here")
    empty = {"run": None, "epsilon_curve": None} | {name: [] for name in added if name not in ("run", "epsilon_curve")}
    assert from_first == from_second.model_copy(update={"from_schema": 1, **empty})
    assert checked_record(from_first.to_json(), "here") == from_first  # written and read again in the current schema


@pytest.mark.parametrize(
    "path",
    sorted([*RESULTS.glob("choices/*.json"), *RESULTS.glob("cifar10-jpeg/*.json"), *RESULTS.glob("*/records.json")]),
    ids=lambda path: path.relative_to(RESULTS).as_posix(),
)
def test_committed_records_are_read(path, caplog):
    records = json.loads(path.read_text())
    assert records
    for content in records:
        assert checked_record(content, str(path)).method == content["method"]
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('{"schema": 2', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds no Record"),
        ("null", "holds no Record"),
        ('{"results": []}', "holds no Record"),
        ('{"schema": 1, "network": "ResNet"}', "holds no Record (method is missing)"),
        ('{"schema": "2"}', "holds no Record (schema '2'; 1 to 3 are known)"),
        ('{"schema": 0}', "holds no Record (schema 0; 1 to 3 are known)"),
        ('{"schema": 4}', "holds a Record of schema 4; this advmoe reads 1 to 3: a newer one is needed"),
    ],
)
def test_a_file_without_a_record_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "record.json"
    path.write_text(text)
    assert refusal(read_record, path).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sa", "high", "sa is 'high', not a number from 0 to 100"),
        ("sa", float("nan"), "sa is nan, not a number from 0 to 100"),
        ("sa", True, "sa is True, not a number from 0 to 100"),
        ("ra_worst", 1e30, "ra_worst is 1e+30, not a number from 0 to 100"),
        ("ra", [], "ra is [], not an object"),
        ("test_images", 0, "test_images is 0, not a whole number of at least 1"),
        ("params", 10**400, f"params is {10**17}...{'0' * 19}, not a whole number of at least 0"),
        ("config", None, "config is None, not an object"),
        ("run", "\ud800", "nested more than 12 deep, or with text that is no Unicode"),
    ],
)
def test_garbled_fields_are_named(record, name, value, message):
    assert refusal(checked_record, {**record().to_json(), name: value}, "here") == f"here: holds no Record ({message})"


def test_a_record_without_ra_worst_is_refused(record):
    content = record().to_json()
    del content["ra_worst"]
    with pytest.raises(UserError, match=r"\(ra_worst is missing\)"):
        checked_record(content, "here")


def test_garbled_optional_parts_are_left_out_and_named_in_one_line(record, caplog):
    content = {**record().to_json(), "hardware": float("nan"), "history": [{"epoch": 1}], "gallery": [[]]}
    result = checked_record(content, "here")
    assert (result.hardware, result.history, result.gallery) == (None, [], [])
    assert caplog.messages == ["here: read without its garbled parts: history, gallery, hardware"]


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.json: cannot be read \(No such file"):
        read_record(tmp_path / "nowhere.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bytes.json: is not JSON"):
        read_record(tmp_path / "bytes.json")


def test_a_record_does_not_contain_the_data_folder(record):
    assert record().config.section("data")["data_dir"] is None


def test_files_larger_than_any_record_are_not_read(tmp_path):
    with (tmp_path / "record.json").open("wb") as file:
        file.truncate(2**33)  # a sparse file
    with pytest.raises(UserError, match=r"record.json: has 8,589,934,592 bytes; at most 67,108,864 are read"):
        read_record(tmp_path / "record.json")


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "record.json")
    with pytest.raises(UserError, match=r"record.json: not a plain file"):
        read_record(tmp_path / "record.json")


@pytest.mark.parametrize(
    "text", ['{"schema": 3, "sa": NaN}', '{"schema": 1, "schema": 9}', '{"schema": ' + "9" * 5000 + "}", '{"schema": 1e999}']
)
def test_odd_json_is_refused(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(UserError, match=r"record.json: (is not JSON|holds no Record|holds a Record of schema 9)"):
        read_record(tmp_path / "record.json")


def test_images_are_in_a_file_beside_the_record_unless_keep_images(evaluated, tmp_path, caplog):
    record, path = evaluated(), tmp_path / "record.json"
    write_record(path, record)
    assert json.loads(path.read_text())["gallery"] == []
    assert "png" not in path.read_text()
    assert read_record(path).gallery == record.gallery
    (tmp_path / "gallery.json").write_text(json.dumps({"time": "another evaluation's", "gallery": record.to_json()["gallery"]}))
    assert read_record(path).gallery == []
    for damaged in ("{", "[1]", '{"time": null}'):
        (tmp_path / "gallery.json").write_text(damaged)
        assert read_record(path).gallery == []
    (warning,) = caplog.messages
    assert warning.startswith(f"{tmp_path / 'gallery.json'}: is not JSON")
    assert warning.endswith(": the Record is read without its images")
    write_record(path, record, keep_images=True)
    assert not (tmp_path / "gallery.json").exists()
    assert read_record(path) == record


def test_the_digest_depends_on_names_dtypes_shapes_and_bytes():
    torch.manual_seed(0)
    one, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    other.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(other)
    assert weights_digest(other.double()) != weights_digest(one)
    other.float()
    with torch.no_grad():
        other.bias[0] = torch.nextafter(other.bias[0], torch.tensor(9.0))
    assert weights_digest(other) != weights_digest(one)
    assert weights_digest(torch.nn.Linear(3, 2)) != weights_digest(torch.nn.Sequential(one))


def test_a_part_of_the_shards_makes_no_record(evaluated):
    with pytest.raises(UserError, match="a Record is of all shards"):
        evaluated(part=(0, 2), shard_size=10)


def test_a_record_has_the_digest_of_its_weights(evaluated):
    assert len(evaluated().weights) == 64


def test_unknown_fields_of_a_configuration_are_kept(record):
    content = record().to_json()
    content["config"]["training"]["lr_of_later"] = [0.1, None]
    result = checked_record(content, "here")
    assert result.config.section("training")["lr_of_later"] == [0.1, None]
    assert result.config.training.epochs == content["config"]["training"]["epochs"]
    assert Record.model_validate(result.to_json()) == result
