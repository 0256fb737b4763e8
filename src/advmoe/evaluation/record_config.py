"""The section `config` of a Record: the run's configuration, as the version that trained the run wrote it."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict

from advmoe.evaluation.record_fields import NonNegativeFloat, NonNegativeInt, RecordModel, Scale, Size, ValidValues, Value, plain
from advmoe.files import JsonObject


class Settings(RecordModel):
    """One section of a configuration. The fields that reports read have types; all others are kept as they were written."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Value]


class ModelSettings(Settings):
    """The section `model`."""

    width: Size | None = None
    model_scale: Scale
    num_experts: Size


class AttackSettings(Settings):
    """The section `attack`: the training attack."""

    epsilon: NonNegativeFloat
    num_steps: NonNegativeInt


class TrainingSettings(Settings):
    """The section `training`."""

    epochs: NonNegativeInt


def _section(value: Any) -> Any:
    return {name: plain(item) for name, item in value.items()} if isinstance(value, Mapping) else plain(value)


class RecordedConfig(RecordModel):
    """The run's configuration as any version wrote it. All fields are kept; those that reports read have types."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(_section), ValidValues("an object of settings, or a setting")]]
    model: ModelSettings
    attack: AttackSettings
    training: TrainingSettings

    def section(self, name: str) -> JsonObject:
        """The fields of a section; empty if the configuration does not have it."""
        section = self.model_dump().get(name)
        return section if isinstance(section, dict) else {}
