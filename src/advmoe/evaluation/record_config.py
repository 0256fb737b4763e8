"""The section `config` of a Record: the run's configuration as whatever version wrote it."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict

from advmoe.evaluation.record_fields import NotNegative, Part, Scale, Setting, Size, Whole, Words, plain
from advmoe.files import JsonObject


class Settings(Part):
    """One section of a configuration: the fields that reports read, and any other one as it was written."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Setting]


class ModelSettings(Settings):
    """The section `model`."""

    width: Size | None = None
    model_scale: Scale
    num_experts: Size


class AttackSettings(Settings):
    """The section `attack`: the attack in training."""

    epsilon: NotNegative
    num_steps: Whole


class TrainingSettings(Settings):
    """The section `training`."""

    epochs: Whole


def _section(value: Any) -> Any:
    return {name: plain(item) for name, item in value.items()} if isinstance(value, Mapping) else plain(value)


class RecordedConfig(Part):
    """The run's configuration as it was written, by whatever version: every field is kept, those that reports read are typed."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(_section), Words("an object of settings, or a setting")]]
    model: ModelSettings
    attack: AttackSettings
    training: TrainingSettings

    def section(self, name: str) -> JsonObject:
        """The fields of a section, none where the configuration lacks it."""
        section = self.model_dump().get(name)
        return section if isinstance(section, dict) else {}
