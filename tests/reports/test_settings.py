"""The settings in which runs may differ."""

from records import changed_record, content, record

from advmoe.config import TrainingConfig
from advmoe.evaluation.record_file import checked_record
from advmoe.reports.cell import OF_ROUTERS
from advmoe.reports.settings import departures, settings, shared_settings


def test_settings_are_those_that_the_method_uses():
    assert settings(changed_record("training", router_lr=0.5)) != settings(record())
    assert settings(changed_record("training", "at_dense", router_lr=0.5)) == settings(record("at_dense"))
    assert settings(changed_record("model", "at_dense", model_scale=0.2)) == settings(record("at_dense"))
    assert settings(changed_record("runtime", threads=3, device="cuda")) == settings(record(seed=5))
    assert settings(changed_record("runtime", precision="bfloat16")) != settings(record())


def test_options_of_routers_do_not_separate_networks_without_routers():
    names = {f"training.{name}" for name in TrainingConfig.model_fields if "router" in name or "level" in name}
    assert names <= set(OF_ROUTERS)
    untied = changed_record("training", "advmoe", router_schedule="untied", router_statistics="plain")
    assert settings(untied) != settings(record("advmoe"))
    assert shared_settings(untied) == shared_settings(record("advmoe"))


def test_a_record_that_does_not_say_the_settings_of_its_attacks_has_the_defaults():
    assert settings(record(attack_precision="float32")) == settings(record())


def test_a_record_older_than_a_field_has_its_default():
    old = content()
    del old["config"]["training"]["router_warmup"]
    assert settings(checked_record(old, "here")) == settings(record())


def test_departures_name_the_settings_that_are_not_the_default():
    assert departures(record()) == ()
    assert departures(changed_record("training", lr=0.05, batch_size=64)) == (
        "training.batch_size 64 (128)",
        "training.lr 0.05 (0.1)",
    )
    assert departures(changed_record("training", "at_dense", router_lr=0.05)) == ()
    assert departures(record(epsilon=0.2)) == ("attack.epsilon 0.1 (0.03137)",)
