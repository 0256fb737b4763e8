"""What a run is: its settings as validated models, and the YAML files that hold them."""

from advmoe.config.schema import (
    AttackConfig,
    ComputeConfig,
    DataConfig,
    Fraction,
    ModelConfig,
    Precision,
    RunConfig,
    RuntimeConfig,
    Section,
    TrainingConfig,
    parse_fraction,
)
from advmoe.config.yaml import (
    CONFIG_FILE,
    OF_MACHINE,
    StoredConfig,
    differences,
    dump_yaml,
    flat_settings,
    from_dict,
    load_run_config,
    load_yaml,
    read_mapping,
    to_dict,
)

__all__ = [
    "CONFIG_FILE", "OF_MACHINE", "AttackConfig", "ComputeConfig", "DataConfig", "Fraction", "ModelConfig", "Precision",
    "RunConfig", "RuntimeConfig", "Section", "StoredConfig", "TrainingConfig", "differences", "dump_yaml", "flat_settings",
    "from_dict", "load_run_config", "load_yaml", "parse_fraction", "read_mapping", "to_dict",
]  # fmt: skip
