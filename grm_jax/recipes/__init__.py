"""What a training run is made of, as frozen dataclasses; `configs/*.py` return them, `load` reads such a file.

1. A file in `configs/` defines `config()`, which returns one of the recipes of `stages`: numbers, each with its unit or
   source.
2. `--config FILE --field value` changes single fields; a field that is not there is an error that lists the known ones.
3. The resolved config is saved with the run (`as_json`), and a run that goes on must agree with it (`check_same`).

No array library is imported here. Sections and equations are those of the paper, arXiv 2504.02495.
"""

from grm_jax.recipes.files import as_json, check_same, load, read
from grm_jax.recipes.parts import LORA_TARGETS, Checkpoints, Fresh, Items, Lora, Optimizer
from grm_jax.recipes.stages import (
    CloudConfig,
    MetaConfig,
    Objective,
    PairsConfig,
    RftConfig,
    RlConfig,
    SampleConfig,
    ScalarConfig,
)

__all__ = [
    "LORA_TARGETS",
    "Checkpoints",
    "CloudConfig",
    "Fresh",
    "Items",
    "Lora",
    "MetaConfig",
    "Objective",
    "Optimizer",
    "PairsConfig",
    "RftConfig",
    "RlConfig",
    "SampleConfig",
    "ScalarConfig",
    "as_json",
    "check_same",
    "load",
    "read",
]
