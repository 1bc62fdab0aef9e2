"""What is shipped: the wheel's files and metadata, the dependencies, and the scripts that set everything up."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import grm_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "import sys, setuptools.build_meta as build; build.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the sources alone and without the network."""
    place = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "grm_jax", place / "grm_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(place / "dist")], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = (place / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "grm_jax").rglob("*") if path.is_file()}
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == {name for name in files if "__pycache__" not in name}
    assert {"grm_jax/examples/examples.jsonl", "grm_jax/templates/listwise.txt"} < shipped


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    said = Parser().parsestr(wheel.read(metadata).decode())
    assert said["Version"] == PROJECT["version"] == grm_jax.__version__
    assert (said["License-Expression"], said["License-File"]) == ("Apache-2.0", "LICENSE")
    assert said["Requires-Python"] == ">=3.11"
    assert set(said.get_all("Provides-Extra")) == {"browser", "cuda", "dev", "tpu"}


def test_no_accelerator_is_pulled_in_by_default() -> None:
    asked = [
        dependency for dependency in PROJECT["dependencies"] if re.search("tpu|cuda|nvidia|rocm|torch", dependency)
    ]
    assert asked == []
    extras = PROJECT["optional-dependencies"]
    assert [re.sub(r">=.*", "", *extras[name]) for name in ("tpu", "cuda")] == ["jax[tpu]", "jax[cuda13]"]


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert versions[0] == grm_jax.__version__


@pytest.mark.parametrize("given", ["", "stub"])
def test_set_up_without_a_python_says_what_to_do(given: str, tmp_path: Path) -> None:
    """PATH has the tools of a shell, and no Python that runs; PYTHON may name one that is none."""
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    for stub in ("python3", "stub"):
        (tmp_path / stub).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / stub).chmod(0o755)
    environment = {"PATH": str(tmp_path), "PYTHON": given, "GRM_VENV": str(tmp_path / "venv")}
    done = subprocess.run(
        [shutil.which("bash"), str(ROOT / "launch" / "setup.sh")], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    rule = "PYTHON=stub is no Python 3.11 or newer" if given else "install one, or set PYTHON to its path"
    assert rule in done.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_runs_what_developers_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert 'bash launch/test.sh "$@"' in script.read_text()
