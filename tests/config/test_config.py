import math
import os
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from refusal import refusal

from advmoe.config import (
    DataConfig,
    RunConfig,
    RuntimeConfig,
    Section,
    differences,
    dump_yaml,
    from_dict,
    load_yaml,
    parse_fraction,
    to_dict,
)
from advmoe.config.schema import fraction_text
from advmoe.errors import UserError
from advmoe.recipes import RECIPES

SECTIONS = {name: value for name, value in RunConfig() if isinstance(value, Section)}


def settings_of(kind: type) -> list[str]:
    """The names of the settings of a type, or of it and None."""
    hints = {"": get_type_hints(RunConfig)} | {f"{name}.": get_type_hints(type(section)) for name, section in SECTIONS.items()}
    return [f"{section}{name}" for section, of in hints.items() for name, hint in of.items() if kind in (hint, *get_args(hint))]


FLOATS, INTS = settings_of(float), settings_of(int)


def nested(name: str, value: Any) -> dict[str, Any]:
    """{'section': {'field': value}} for 'section.field'."""
    section, _, field = name.rpartition(".")
    return {section: {field: value}} if section else {field: value}


def value_of(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def error_of(tree: Any) -> str:
    """The one-line error for a configuration."""
    text = refusal(from_dict, tree, "here")
    assert text.startswith("here: ")
    return text.removeprefix("here: ")


def error_of_file(path: Path) -> str:
    text = refusal(load_yaml, path)
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def from_text(folder: Path, content: str) -> RunConfig:
    return load_yaml(write(folder, content))


# Round trips


def covering_recipes() -> list[str]:
    """Recipes that together have every value of every field that any recipe has."""
    covered: set[tuple[str, str, Any]] = set()
    names = []
    for name, config in RECIPES.items():
        values = {
            (section, field, value)
            for section, fields in to_dict(config).items()
            if isinstance(fields, dict)
            for field, value in fields.items()
        } | {("", "method", config.method)}
        if values - covered:
            names.append(name)
            covered |= values
    return names


@pytest.mark.parametrize("name", covering_recipes())
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    assert from_text(tmp_path, dump_yaml(RECIPES[name])) == RECIPES[name]


def test_round_trip_of_unusual_values(tmp_path: Path) -> None:
    tree = {
        "seed": 2**63 - 1,
        "data": {"data_dir": "/place/Böe: #1 'x'\n", "limit_train": 7, "flip": False},
        "attack": {"epsilon": 1 / 3, "step_size": 1e-7},
        "training": {"lr": 5e-324, "weight_decay": 1e22},
    }
    config = from_dict(tree)
    assert from_text(tmp_path, dump_yaml(config)) == config
    assert config.data.data_dir == tree["data"]["data_dir"]


def test_dict_round_trip() -> None:
    for config in RECIPES.values():
        assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("tree", [{}, {"schema": 1}, {"model": {}}, {"training": {}, "data": {}}])
def test_missing_fields_take_their_defaults(tree: dict[str, Any]) -> None:
    assert from_dict(tree) == RunConfig()


def test_given_dict_is_unchanged() -> None:
    tree = to_dict(RunConfig())
    from_dict(tree)
    assert tree == to_dict(RunConfig())


def test_every_field_is_unique_over_the_sections() -> None:
    names = [name for section in (RunConfig, *map(type, SECTIONS.values())) for name in section.model_fields]
    assert len(SECTIONS) == 5
    assert len(set(names)) == len(names)


# Names


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sede": 1}, "unknown field 'sede': did you mean seed?"),
        ({"modle": {}}, "unknown field 'modle': did you mean model?"),
        ({"training": {"epoch": 3}}, "unknown field 'training.epoch': did you mean epochs?"),
        ({"model": {"num_expert": 3}}, "unknown field 'model.num_expert': did you mean num_experts?"),
        ({"qqq": 1}, "unknown field 'qqq': there is attack, data, method, model, runtime, seed, training"),
        ({"attack": {"zzz": 1}}, "unknown field 'attack.zzz': there is epsilon, epsilon_ramp, num_steps, step_size, steps_ramp"),
        ({"attack": {3: 1}}, "unknown field 'attack.3': there is epsilon, epsilon_ramp, num_steps, step_size, steps_ramp"),
        ({"a\nb": 1}, r"unknown field 'a\nb': there is attack, data, method, model, runtime, seed, training"),
    ],
)
def test_unknown_fields(tree: dict[Any, Any], message: str) -> None:
    assert error_of(tree) == message


@pytest.mark.parametrize("schema", [0, 3, "1", None])
def test_schema_mismatch(schema: Any) -> None:
    assert error_of({"schema": schema}) == f"schema {schema!r} is not supported by this version (1 to 2)"


# Types


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("value", [True, False, 3.0, 2.5, "3", [3], {"a": 3}, math.nan])
def test_int_fields_accept_only_ints(name: str, value: Any) -> None:
    assert error_of(nested(name, value)).startswith(f"{name} must be int")


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [True, False, [0.5], {"a": 0.5}])
def test_float_fields_accept_no_bools_or_lists(name: str, value: Any) -> None:
    assert error_of(nested(name, value)).startswith(f"{name} must be float")


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.5, "nan", "inf", "1e999"])
def test_floats_must_be_finite_and_not_negative(name: str, value: Any) -> None:
    assert error_of(nested(name, value)).startswith(f"{name} must be ")


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", ["fast", "", "1/0", "1/2/3", "8/", "/255", "a\nb"])
def test_text_that_is_not_a_number(name: str, value: str) -> None:
    assert error_of(nested(name, value)) == f"{name}: {value!r} is neither a number nor a fraction such as 8/255"


@pytest.mark.parametrize("name", ["attack.epsilon", "model.model_scale", "training.lr", "training.beta", "training.tied_share"])
def test_ints_are_read_as_floats(name: str) -> None:
    value = value_of(from_dict(nested(name, 1)), name)
    assert value == 1
    assert type(value) is float


def test_an_int_too_large_for_a_float() -> None:
    assert error_of({"training": {"lr": 10**400}}) == "training.lr: int too large to convert to float"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"method": 3}, "method must be str, not 3"),
        ({"method": None}, "method must be str, not None"),
        ({"data": {"flip": 1}}, "data.flip must be bool, not 1"),
        ({"data": {"flip": "yes"}}, "data.flip must be bool, not 'yes'"),
        ({"data": {"data_dir": 3}}, "data.data_dir must be str or none, not 3"),
        ({"data": {"limit_train": "x"}}, "data.limit_train must be int or none, not 'x'"),
        ({"training": {"lr": None}}, "training.lr must be float, not None"),
        ({"model": {"bank": "shared"}}, "model.bank must be one of backbone, disjoint, not 'shared'"),
        ({"model": {"stem": ["cifar"]}}, "model.stem must be one of cifar, imagenet, not ['cifar']"),
        ({"runtime": {"precision": 16}}, "runtime.precision must be one of float32, bfloat16, auto, not 16"),
        ({"data": None}, "data must be a mapping of fields, not None"),
        ({"training": [1, 2]}, "training must be a mapping of fields, not [1, 2]"),
        ({"attack": "8/255"}, "attack must be a mapping of fields, not '8/255'"),
    ],
)
def test_wrong_types(tree: dict[str, Any], message: str) -> None:
    assert error_of(tree) == message


def test_a_long_value_is_shortened() -> None:
    assert len(error_of({"training": {"epochs": "x" * 10_000}})) < 100


# Values


@pytest.mark.parametrize(
    ("name", "value", "range_text"),
    [
        ("model.model_scale", 0, "in (0, 1]"),
        ("model.model_scale", 1.01, "in (0, 1]"),
        ("model.num_experts", 0, "in [1, 1000]"),
        ("model.width", 0, "at least 1"),
        ("data.validation_share", 0, "in (0, 1)"),
        ("data.validation_share", 1, "in (0, 1)"),
        ("data.crop_padding", -1, "at least 0"),
        ("data.limit_train", 0, "at least 1"),
        ("data.limit_test", -5, "at least 1"),
        ("attack.epsilon", 1.5, "in [0, 1]"),
        ("attack.step_size", 0, "positive and finite"),
        ("attack.num_steps", 0, "at least 1"),
        ("training.epochs", 0, "at least 1"),
        ("training.batch_size", 0, "at least 1"),
        ("training.router_steps", 0, "at least 1"),
        ("training.weight_steps", -1, "at least 1"),
        ("training.momentum", 1, "in [0, 1)"),
        ("training.tied_share", 1.5, "in [0, 1]"),
        ("training.lr", math.inf, "at least 0 and finite"),
        ("runtime.threads", -1, "in [0, 1024]"),
        ("runtime.threads", 100_000, "in [0, 1024]"),
        ("seed", -1, "in [0, 2**63)"),
        ("seed", 2**63, "in [0, 2**63)"),
    ],
)
def test_out_of_range(name: str, value: Any, range_text: str) -> None:
    printed = float(value) if name in FLOATS else value
    assert error_of(nested(name, value)) == f"{name} must be {range_text}, not {printed}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.model_scale", 1.0),
        ("model.num_experts", 1),
        ("data.crop_padding", 0),
        ("data.limit_train", None),
        ("attack.epsilon", 0.0),
        ("attack.step_size", None),
        ("training.momentum", 0.0),
        ("training.lr", 0.0),
        ("training.tied_share", 1.0),
        ("seed", 2**63 - 1),
    ],
)
def test_the_ends_of_a_range_are_allowed(name: str, value: Any) -> None:
    assert value_of(from_dict(nested(name, value)), name) == value


def test_a_section_checks_its_values() -> None:
    with pytest.raises(UserError, match=r"^validation_share must be"):
        DataConfig(validation_share=2)


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("0.5", 0.5), ("1", 1.0), ("5e-4", 5e-4), ("1e-3/2", 5e-4)],
)
def test_fractions(text: str, value: float) -> None:
    assert parse_fraction(text) == value


@pytest.mark.parametrize(("value", "text"), [(8 / 255, "8/255"), (0.0, "0/255"), (1.0, "255/255"), (0.1, "0.1")])
def test_fractions_in_words(value: float, text: str) -> None:
    assert fraction_text(value) == text


@pytest.mark.parametrize("text", ["8/0", "x", "", "8/255/2", "8//255"])
def test_text_that_is_not_a_fraction(text: str) -> None:
    with pytest.raises(ValueError, match="neither a number nor a fraction such as 8/255"):
        parse_fraction(text)


def test_fractions_and_exponents_in_yaml(tmp_path: Path) -> None:
    config = from_text(tmp_path, "attack: {epsilon: 8/255, step_size: 2/255}\ntraining: {weight_decay: 5e-4, lr: 1e-1}")
    assert (config.attack.epsilon, config.attack.step_size) == (8 / 255, 2 / 255)
    assert (config.training.weight_decay, config.training.lr) == (5e-4, 0.1)


# Files


@pytest.mark.parametrize("name", ["lr", "router_lr", "weight_decay", "beta", "momentum", "tied_share"])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_yaml_numbers_that_are_not_finite(name: str, value: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"training: {{{name}: {value}}}")
    assert error_of_file(path).startswith(f"training.{name} must be ")


@pytest.mark.parametrize("content", ["", "# nothing\n", "- 1\n- 2\n", "just text", "3", "null", "--- \n..."])
def test_yaml_that_is_not_a_mapping(content: str, tmp_path: Path) -> None:
    assert error_of_file(write(tmp_path, content)) == "holds no mapping of fields"


@pytest.mark.parametrize(
    "content",
    [
        "seed: [1",
        "seed: 1\n seed: 2\n  x",
        "{a: b}}",
        "a: 1\n---\nb: 2",
        "seed: 2020-13-45",
        "seed: !!int abc",
        "\tseed: 1",
        "seed: *nothing",
        "[" * 5000,
        b"\x00\x01\x02\xff\xfe",
        b"\x80\x81",
        bytes(range(256)),
    ],
)
def test_not_yaml(content: str | bytes, tmp_path: Path) -> None:
    assert error_of_file(write(tmp_path, content)).startswith("not YAML: ")


@pytest.mark.parametrize(
    ("content", "name", "line"),
    [
        ("seed: 1\nmethod: at_moe\nseed: 2\n", "seed", 3),
        ("training:\n  epochs: 3\n  lr: 0.1\n  epochs: 4\n", "epochs", 4),
        ("training: {lr: 0.1}\ntraining: {epochs: 3}\n", "training", 2),
        ("seed: 1\n'seed': 2\n", "seed", 2),
    ],
)
def test_a_field_that_is_given_twice(content: str, name: str, line: int, tmp_path: Path) -> None:
    assert error_of_file(write(tmp_path, content)) == f"not YAML: {name} is given twice, the second time in line {line}"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system"])
def test_unsafe_tags_do_not_run(tag: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = write(tmp_path, f"method: {tag} ['touch {mark}']")
    assert error_of_file(path).startswith("not YAML: could not determine a constructor for the tag")
    assert not mark.exists()


def test_no_file(tmp_path: Path) -> None:
    assert error_of_file(tmp_path / "none.yaml") == "cannot be read (No such file or directory)"


def test_a_folder(tmp_path: Path) -> None:
    assert error_of_file(tmp_path) == "cannot be read (Is a directory)"


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: Any) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert error_of_file(write(tmp_path, "{}")) == "cannot be read (Permission denied)"


def test_file_errors_name_file_and_field(tmp_path: Path) -> None:
    path = write(tmp_path, "training:\n  epochs: many\n")
    assert error_of_file(path) == "training.epochs must be int, not 'many'"


def test_a_mapping_that_contains_itself(tmp_path: Path) -> None:
    assert error_of_file(write(tmp_path, "&all\nmodel: *all\n")) == (
        "unknown field 'model.model': " + error_of_file(write(tmp_path, "model: {model: 1}")).partition(": ")[2]
    )


def test_nested_aliases_do_not_lengthen_the_message(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    tree = "seed: &top\n" + "\n".join(f"  {level}" for level in levels)
    assert len(error_of_file(write(tmp_path, tree))) < 200


def test_dumped_text_is_plain_yaml() -> None:
    assert yaml.safe_load(dump_yaml(RunConfig())) == to_dict(RunConfig())


# Differences


def with_value(name: str, value: Any) -> RunConfig:
    return from_dict(nested(name, value))


def test_same_runs_do_not_differ() -> None:
    assert differences(RunConfig(), RunConfig()) == []


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("seed", 3, "seed: 0, not 3"),
        ("method", "at_moe", "method: advmoe, not at_moe"),
        ("training.epochs", 7, "training.epochs: 100, not 7"),
        ("data.limit_train", 50, "data.limit_train: None, not 50"),
        ("model.bank", "disjoint", "model.bank: backbone, not disjoint"),
    ],
)
def test_one_difference(name: str, value: Any, line: str) -> None:
    assert differences(RunConfig(), with_value(name, value)) == [line]


def test_every_difference_is_listed() -> None:
    other = from_dict({"seed": 1, "training": {"lr": 0.2, "epochs": 3}})
    assert differences(RunConfig(), other) == ["seed: 0, not 1", "training.epochs: 100, not 3", "training.lr: 0.1, not 0.2"]


def test_device_threads_and_data_folder_are_no_difference() -> None:
    other = RunConfig().replace(runtime=RuntimeConfig(device="cuda", threads=3), data=DataConfig(data_dir="/x"))
    assert differences(RunConfig(), other) == []


def test_another_precision_is_a_difference() -> None:
    other = RunConfig().replace(runtime=RuntimeConfig(precision="bfloat16"))
    assert differences(RunConfig(), other) == ["runtime.precision: float32, not bfloat16"]


# Untrusted files


@pytest.mark.parametrize(
    "value",
    [
        "!!int ''",
        "!!float ''",
        "!!bool x",
        "!!timestamp x",
        "!!binary '*'",
        f"{'1:' * 200}1.5",
        f"0x{'f' * 5000}",
        "!x y",
        "!!set [1]",
    ],
)
def test_values_that_do_not_match_their_tag(value: str, tmp_path: Path) -> None:
    assert error_of_file(write(tmp_path, f"seed: {value}"))
    assert error_of_file(write(tmp_path, f"{value}: 1"))


def test_merged_mappings_are_refused_before_they_are_expanded(tmp_path: Path) -> None:
    levels = ["a0: &a0 {x: 1, y: 2}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)]
    assert "could not determine a constructor for the tag" in error_of_file(write(tmp_path, "\n".join(levels)))


def test_aliases_in_the_schema_field_do_not_lengthen_the_message(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert len(error_of_file(write(tmp_path, "\n".join([*levels, "schema: *a11"])))) < 200


def test_numbers_that_cannot_be_written_again_are_refused(tmp_path: Path) -> None:
    text = error_of_file(write(tmp_path, f"training: {{epochs: 0x{'f' * 5000}}}"))
    assert text == "training.epochs must be less than 2**64, not a number of thousands of digits"


def test_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    assert error_of_file(write(tmp_path, '"\\e[2J": 1')).startswith(r"unknown field '\x1b[2J'")


def test_long_names_are_shortened(tmp_path: Path) -> None:
    assert len(error_of_file(write(tmp_path, f"{'x' * 900}: 1"))) < 300


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    with path.open("wb") as file:
        file.truncate(2**33)  # a sparse file
    assert error_of_file(path) == "has 8,589,934,592 bytes; at most 262,144 are read"


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    assert error_of_file(tmp_path / "config.yaml") == "not a plain file"
