"""The house's rules, read from its source: imports go down the floors, the tail is short, the front door is light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "grm_jax"
# A file or folder of grm_jax stands on one floor; its imports go to lower ones, strictly. Inside one folder files may
# import each other, without cycles. "__init__" is grm_jax itself: the Python API, which loads `grm` when it is asked for.
FLOORS = (
    {"config", "damage", "datatypes", "gguf_file", "log", "memory", "neutral", "processes", "turns", "vocab"},
    {
        "buckets",
        "dealing",
        "expected",
        "head",
        "hosts",
        "losses",
        "prompts",
        "recipes",
        "rewards",
        "scores",
        "sharding",
        "stopping",
        "tokenizer",
        "voting",
    },
    {"data", "models", "reading", "verdicts"},
    {"checkpoint", "metrics", "sampler", "train", "weights"},
    {"judging"},
    {"grm", "scalar_rm", "steps"},
    {"meta_rm"},
    {"baselines"},
    {"__init__"},
    {"bench", "score", "spct"},
    {"convert", "evals", "plan"},
    {"main"},
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
LINES_OF_FILE, LINES_OF_FUNCTION = 400, 80
# What is longer, each with its reason: {"folder/file.py": "...", "folder/file.py:function": "..."}.
LONG: dict[str, str] = {}
HEAVY = {"etils", "flax", "gguf", "jax", "jaxlib", "numpy", "optax", "orbax", "tensorflow_datasets", "tokenizers"}


def module_of(path: Path) -> str:
    """grm_jax/sampler/draw.py is "sampler.draw", a folder's __init__ the folder, the package's own "__init__"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    return module.split(".")[0]


SOURCES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(source: str, modules: set[str]) -> Iterator[str]:
    """Modules of grm_jax that a source imports anywhere in it: in functions and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the absolute import, from grm_jax..."
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, inner = name.partition(".")
            if package != "grm_jax":
                continue
            while inner and inner not in modules:  # the last part is a function or a class
                inner = inner.rpartition(".")[0]
            yield inner or "__init__"


def violations(sources: dict[str, str]) -> list[str]:
    """Every import that does not go down, and every module or unit that the table and the tree do not share."""
    unknown = sorted({unit_of(module) for module in sources} - set(FLOOR_OF))
    found = [f"{unit} is on no floor: add it to FLOORS in tests/test_floors.py" for unit in unknown]
    graph = {module: set(imported(source, set(sources))) - {module} for module, source in sources.items()}
    for module, targets in graph.items():
        for target in sorted(targets):
            here, there = unit_of(module), unit_of(target)
            if {here, there} <= set(FLOOR_OF) and here != there and FLOOR_OF[there] >= FLOOR_OF[here]:
                found.append(f"{module} (floor {FLOOR_OF[here]}) imports {target} (floor {FLOOR_OF[there]}): go down")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"imports go round: {' <- '.join(error.args[1])}")
    return found


def test_imports_go_down_the_floors() -> None:
    assert violations({module: path.read_text() for module, path in SOURCES.items()}) == []


def test_every_unit_of_the_table_exists() -> None:
    assert set(FLOOR_OF) - {unit_of(module) for module in SOURCES} == set()


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ({"log": "from grm_jax import grm", "grm": ""}, "log (floor 0) imports grm (floor 5)"),
        ({"voting": "def f():\n    import grm_jax.scores", "scores": ""}, "voting (floor 1) imports scores (floor 1)"),
        ({"data.jsonl": "from grm_jax.models.config import X", "models.config": ""}, "imports models.config (floor 2)"),
        ({"grm": "from grm_jax import load", "__init__": ""}, "grm (floor 5) imports __init__ (floor 8)"),
        ({"helpers": ""}, "helpers is on no floor: add it to FLOORS"),
        ({"data.a": "import grm_jax.data.b", "data.b": "from grm_jax.data.a import X"}, "imports go round"),
    ],
)
def test_what_breaks_the_rule_is_named(sources: dict[str, str], said: str) -> None:
    assert [said in line for line in violations(sources)] == [True]


def test_what_keeps_the_rule_passes() -> None:
    assert (
        violations({"grm": "from grm_jax.data.a import X", "data.a": "from grm_jax.data.b import Y", "data.b": ""})
        == []
    )


def long_ones() -> dict[str, int]:
    """Files and functions over the limits, with their lines."""
    found = {}
    for path in SOURCES.values():
        text, name = path.read_text(), path.relative_to(PACKAGE).as_posix()
        if (lines := text.count("\n")) > LINES_OF_FILE:
            found[name] = lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > LINES_OF_FUNCTION:
                    found[f"{name}:{node.name}"] = lines
    return found


def test_the_tail_is_short() -> None:
    found = long_ones()
    without = {name: lines for name, lines in found.items() if name not in LONG}
    assert without == {}, "split it, or give a reason in LONG"
    assert set(LONG) - set(found) == set(), "these are short now: take them out of LONG"


@pytest.mark.parametrize(
    "code",
    [
        "import grm_jax; grm_jax.Example, grm_jax.load",
        "import grm_jax.main",
        "import grm_jax.data.jsonl",
        "import grm_jax.score",
        "from grm_jax.main import main; main(['score', '--help'])",
        "from grm_jax.main import main; assert main(['score', '--input', 'no-such-file']) == 2",
        "from grm_jax.main import main; main(['score', '--votes', '0'])",
    ],
)
def test_nothing_heavy_is_imported_before_a_model_is(code: str) -> None:
    script = f"""
import sys
try:
    {code}
except SystemExit as stop:
    assert stop.code in (None, 0, 2)
print("heavy:", *sorted({{name.split(".")[0] for name in sys.modules}} & {HEAVY!r}))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy:"
