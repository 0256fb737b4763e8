"""The model card of a published network."""

import yaml
from records import content, old_record, quick, record

from advmoe.config import DataConfig, ModelConfig, RunConfig, RuntimeConfig, TrainingConfig
from advmoe.config.yaml import differences, load_run_config
from advmoe.reports.model_card import model_card


def card(run=None, **changes):
    return model_card(run or record(**changes), "someone/robust", ["a", "b"], (1, 28, 28))


def head(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_head_has_the_figures_for_the_hub():
    run = record()
    (result,) = head(card(run))["model-index"][0]["results"]
    assert result["dataset"]["name"] == "fashion-mnist"
    figures = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert figures["RA-worst"] == run.ra_worst
    assert figures["SA"] == run.sa


def test_the_card_says_what_was_measured_and_where():
    text = card()
    assert "Linf perturbations of up to 0.1" in text
    assert "**49.0 %** of 300 test images" in text
    assert "| RA-worst | 49.0 | 44.0 to 54.0 |" in text
    assert 'advmoe.load("someone/robust")' in text
    assert "2 experts a layer at model scale 0.5" in text
    assert "experts a layer" not in card(method="at_dense")
    assert "is not part of advmoe" not in text
    assert "The backbone `mine` is not part of advmoe: add it to `advmoe.models.MODELS`" in card(backbone="mine")


def test_the_card_names_the_code_that_trained_the_network():
    assert "Trained by advmoe 0.1.0, commit 1a2b." in card(trained_by=[{"advmoe": "0.1.0", "commit": "1a2b"}])
    assert "Trained by" not in card()


def test_attacks_and_checks_are_listed():
    text = card()
    assert r"| pgd\_50 | 240 | 80 |" in text
    assert "| 1 | same image, same answer | pass | logits differ by 4.8e-07 |" in text


def test_its_settings_are_a_file_that_gives_the_same_configuration(tmp_path):
    config = RunConfig(
        method="at_moe", seed=3, model=ModelConfig(width=32), data=DataConfig(data_dir="/data", limit_train=9),
        training=TrainingConfig(epochs=4, tied_share=0.5), runtime=RuntimeConfig(threads=2, precision="bfloat16"),
    )  # fmt: skip
    text = card(method="at_moe", seed=3, config=config.model_dump(mode="json"))
    (tmp_path / "settings.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    settings = load_run_config(tmp_path / "settings.yaml")
    assert differences(settings, config) == []
    assert (settings.data.data_dir, settings.runtime.threads) == (None, 0)


def test_limits_name_failed_checks_and_an_untrustworthy_autoattack():
    text = card()
    assert "Check 5 (RA-AA near RA-worst) ended with fail: RA-AA is 0.50 points above RA-worst." in text
    assert "AutoAttack's figure is not to be trusted" in text
    assert "Check 1 (" not in text


def test_a_quick_evaluation_is_named_as_such():
    evaluation = content()["evaluation"] | {"left_out": {"transfer": "no network"}, "checks": []}
    evaluation |= {"figures": {"ra_worst_quick": 52.0}, "intervals": {"ra_worst_quick": [47.0, 57.0]}}
    text = card(quick(record(ra_worst=..., ra_worst_quick=52.0, evaluation=evaluation)))
    assert "RA-worst (quick)" in text
    assert "RA-worst is usually lower" in text
    assert "**52.0 %**" in text
    assert "`transfer` was not run: no network." in text
    assert "None was made" in text


def test_records_of_the_older_schema_have_a_card():
    assert "**49.0 %**" in card(old_record())
