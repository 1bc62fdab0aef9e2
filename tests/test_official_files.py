"""What the loaders take as official files, and how they name what is none: endings, shapes, and what cannot be read."""

import contextlib
import gzip
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from grm_jax.data.benchmarks import BENCHMARKS, load, prepared
from grm_jax.data.jsonl import DataError, RowError
from grm_jax.main import main

ENDINGS = [form + packed for form in (".json", ".jsonl", ".parquet") for packed in ("", ".gz")]


def write(path: Path, rows: list[dict]) -> None:
    """The rows in the form that the path's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    form = path.name.removesuffix(".gz")
    if form.endswith(".parquet"):
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        data = sink.getvalue()
    elif form.endswith(".jsonl"):
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        data = json.dumps(rows).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


PAIR = {"prompt": "1+1?", "chosen": "2", "rejected": "3", "subset": "math-prm", "id": 7}
FOUR = {"prompt": "1+1?", "chosen": ["2"], "rejected": ["3", "4", "5"], "subset": "Math", "id": "7"}
SIX = {"id": "c-1", "prompt": "?", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "chat"}
CONFLICT = {
    "question_id": 5, "model_name": "m", "prompt": "?", "response_1": "a", "response_2": "b",
    "scores": [False, True], "sampled_conflict_pairs": [[1, 0]],
}  # fmt: skip
TALK = [{"role": "user", "content": "help"}]
RMB = {
    "Pairwise_set": {
        "pair_uid": "p", "conversation_input": TALK, "chosen": {"answer": "a"}, "reject": {"answer": "b"},
    },
    "BoN_set": {
        "bon_uid": "b", "conversation_input": TALK, "bon_best": {"answer": "a"}, "loser_list": [{"answer": "b"}],
    },
}  # fmt: skip
JUDGE = {
    "pair_id": "p",
    "source": "mmlu-pro-law",
    "question": "?",
    "response_A": "a",
    "response_B": "b",
    "label": "A>B",
}
TOLD = {"id": "1", "task_name": "t", "llm_response_model": "m"}
BAR = {"input": "?", "output_1": "a", "output_2": "b", "label": 2}
# Files of each benchmark, without their endings: the rows, and the ending that the official files have.
OFFICIAL = {
    "reward_bench": (".parquet", {"data/filtered-00000-of-00001": [PAIR]}),
    "reward_bench_2": (".parquet", {"data/test-00000-of-00001": [FOUR]}),
    "ppe_preference": (
        ".parquet",
        {"data/test": [{"question_id": "q", "prompt": "?", "response_1": "a", "response_2": "b", "winner": "model_a"}]},
    ),
    "ppe_correctness": (
        ".parquet",
        {f"PPE-{n}-Best-of-K/data/train": [CONFLICT] for n in ("MMLU-Pro", "MATH", "GPQA", "MBPP-Plus", "IFEval")},
    ),
    "rmb": (
        ".json",
        {f"RMB/{kind}/{part}/QA/x": [row] for kind, row in RMB.items() for part in ("Helpfulness", "Harmlessness")},
    ),
    "rm_bench": (
        ".json",
        {f"data/{domain}_filtered": [SIX | {"domain": domain}] for domain in ("chat", "safety-refuse")},
    ),
    "judge_bench": (".jsonl", {"data/dataset=judgebench,response_model=gpt-4o": [JUDGE]}),
    "real_mistake": (
        ".jsonl",
        {"data/t/m": [{"input": "?", "llm_response": "a", "error_label": "error", "metadata": TOLD}]},
    ),
    "llm_bar": (".json", {"LLMBar/Natural/dataset": [BAR], "LLMBar/Adversarial/Manual/dataset": [BAR]}),
    "preferences": (".jsonl", {"mine": [{"id": "a", "prompt": "?", "chosen": "x", "rejected": "y"}]}),
}


# ---------------------------------------------------------------- endings


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_form_is_read_plain_and_packed(tmp_path, name, ending):
    official, files = OFFICIAL[name]
    for stem, rows in files.items():
        write(tmp_path / "official" / f"{stem}{official}", rows)
        write(tmp_path / "here" / f"{stem}{ending}", rows)
        for beside in (".jsonl.run.json", ".jsonl.ahead", ".jsonl.gz.run.json"):  # as `score --output` leaves them
            write(tmp_path / "here" / f"{stem}{beside}", [{"settings": 1}])
    found = BENCHMARKS[name](str(tmp_path / "here"))
    assert len(found.cases) == sum(map(len, files.values()))
    assert found == BENCHMARKS[name](str(tmp_path / "official"))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("name", "first", "other", "row"),
    [
        ("reward_bench", "filtered", "raw", PAIR),
        ("reward_bench", "filtered/0", "raw/0", PAIR),
        ("rm_bench", "data/total_dataset", "data/chat_filtered", SIX),
        ("judge_bench", "data/gpt", "outputs/gpt", JUDGE),
        ("judge_bench", "gpt/test", "claude/test", JUDGE),
    ],
)
def test_the_named_files_win_over_others_in_any_form(tmp_path, name, first, other, row, ending):
    write(tmp_path / f"{first}{ending}", [row])
    for form in ENDINGS:
        write(tmp_path / f"{other}{form}", [{"something": "else"}])
    assert len(BENCHMARKS[name](str(tmp_path)).cases) == 1


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_official_form_wins_and_a_file_kept_in_two_is_read_once(tmp_path, name):
    official, files = OFFICIAL[name]
    for stem, rows in files.items():
        write(tmp_path / f"{stem}{official}", rows)
        write(tmp_path / f"{stem}{official}.gz", rows)
        for form in {".json", ".jsonl", ".parquet"} - {official}:
            write(tmp_path / f"{stem}{form}", [{"something": "else"}])
    assert len(BENCHMARKS[name](str(tmp_path)).cases) == sum(map(len, files.values()))


def test_what_is_missing_is_said_with_the_forms_that_would_do(tmp_path):
    write(tmp_path / "x.jsonl.run.json", [PAIR])
    with pytest.raises(FileNotFoundError, match=r"filtered.*\.jsonl, \.parquet, \.json, plain or \.gz\): download"):
        BENCHMARKS["reward_bench"](str(tmp_path))


# ---------------------------------------------------------------- shapes


def responses(*scores: float, subset: str = "chat") -> dict:
    """A row of RM-Bench in one list."""
    texts = list("abcdefgh"[: len(scores)])
    return {"id": "c", "prompt": "?", "responses": texts, "scores": list(scores), "subset": subset}


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        (
            "rm_bench",
            SIX | {"chosen": ["a", "b"], "rejected": ["c", "d", "e", "f"]},
            'a row has three chosen and three rejected responses; found {"chosen": 2, "rejected": 4}',
        ),
        ("rm_bench", SIX | {"domain": "safety"}, "a domain is one of chat, math, code, safety-refuse, safety-response"),
        ("rm_bench", SIX | {"domain": "safety"}, '; found "safety"'),
        ("rm_bench", responses(1, 1, 0, 0), 'three rejected responses; found {"chosen": 3, "rejected": 1}'),
        ("rm_bench", responses(1, 1, 1, 0, 0, 0, subset="Chat"), '; found "Chat"'),
        ("rm_bench", responses(1, 1, 0, 0, 0, 0), "the three chosen come first, and have the higher scores"),
        ("rm_bench", responses(0, 0, 0, 1, 1, 1), "found [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]"),
        (
            "reward_bench_2",
            FOUR | {"rejected": ["3"]},
            'a row of Math has one chosen and three rejected responses; found {"chosen": 1, "rejected": 1}',
        ),
        ("reward_bench_2", FOUR | {"chosen": ["2", "two"]}, 'found {"chosen": 2, "rejected": 3}'),
        (
            "reward_bench_2",
            FOUR | {"subset": "math"},
            'a subset is one of Factuality, Focus, Math, Precise IF, Safety, Ties; found "math"',
        ),
    ],
)
def test_a_row_of_another_shape_is_refused(tmp_path, name, row, said):
    write(tmp_path / "x.json", [row])
    with pytest.raises(DataError, match=r"official files have them; (take|download) ") as refused:
        BENCHMARKS[name](str(tmp_path))
    assert f"{tmp_path / 'x.json'}:1: " in str(refused.value)
    assert said in str(refused.value)


def test_what_has_the_official_shape_is_taken(tmp_path):
    six = [responses(*scores, subset="math") for scores in ((1, 1, 1, 0, 0, 0), (5, 9, 5, 1, 4, 4))]
    bare = responses(*[0] * 6)
    del bare["scores"]
    write(tmp_path / "six.jsonl", [*six, bare])
    found = BENCHMARKS["rm_bench"](str(tmp_path)).cases
    assert [case.example.scores for case in found] == [(1.0, 1.0, 1.0, 0.0, 0.0, 0.0)] * 3
    ties = FOUR | {"subset": "Ties", "id": "tied:1", "chosen": ["2", "two", "II"], "rejected": ["3"] * 6}
    write(tmp_path / "ties.json", [ties])
    (only,) = BENCHMARKS["reward_bench_2"](str(tmp_path / "ties.json")).cases
    assert only.example.scores == (1.0,) * 3 + (0.0,) * 6


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sampled_conflict_pairs": [[0, 1, 2]]}, "two responses, each a whole number from 0 to 1; found [0, 1, 2]"),
        ({"sampled_conflict_pairs": "[[0,1]]"}, "'sampled_conflict_pairs' is a list of pairs; found \"[[0,1]]\""),
        ({"sampled_conflict_pairs": [[0, -1]]}, "a whole number from 0 to 1; found [0, -1]"),
        ({"sampled_conflict_pairs": [[0, 2]]}, "a whole number from 0 to 1; found [0, 2]"),
        ({"sampled_conflict_pairs": [[False, True]]}, "a whole number from 0 to 1; found [false, true]"),
        ({"sampled_conflict_pairs": [[0, 0]]}, "a conflict pair has one right response; found [0, 0]"),
        ({"scores": [0.2, 0.9]}, "'scores' are true or false, or 1 and 0; found [0.9, 0.2]"),
        ({"scores": ["false", "true"]}, "'scores' are true or false"),
        ({"scores": "ft"}, "'scores' is a list that is not empty"),
    ],
)
def test_a_conflict_that_is_none_is_refused(tmp_path, changed, said):
    for name in ("MMLU-Pro", "MATH", "GPQA", "MBPP-Plus", "IFEval"):
        write(tmp_path / f"PPE-{name}-Best-of-K.jsonl", [CONFLICT, CONFLICT | changed])
    with pytest.raises(DataError, match="official files have them; download ") as refused:
        BENCHMARKS["ppe_correctness"](str(tmp_path))
    assert "PPE-MMLU-Pro-Best-of-K.jsonl:2: " in str(refused.value)
    assert said in str(refused.value)


# ---------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("file", "data", "at"),
    [
        ("x.jsonl", "\n" + "[" * 200_000, "x.jsonl:2"),
        ("x.json", "[" * 200_000, "x.json"),
        ("y.jsonl", "{", "y.jsonl:1"),
    ],
)
def test_json_that_cannot_be_decoded_is_said_once(tmp_path, file, data, at):
    (tmp_path / file).write_text(data)
    with pytest.raises(DataError, match=rf"^cannot read {tmp_path}/{at}: .*; give the official file$") as refused:
        BENCHMARKS["preferences"](str(tmp_path))
    assert str(refused.value).count("cannot read") == 1


def test_a_value_too_deep_to_show_is_still_a_fault_of_its_row():
    value: list = []
    for _ in range(2_000):
        value = [value]
    assert str(RowError(value, "'prompt' is a string")) == "'prompt' is a string; found lists in lists in lists"


@pytest.fixture
def shared():
    """A folder that all users may read, unlike those of `tmp_path`."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def closed(path: Path) -> Iterator[None]:
    """Nobody may read the path, and this process is nobody: root may read everything."""
    mode = path.stat().st_mode
    path.chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


@pytest.mark.parametrize("name", ["here/x.jsonl", "here/more", "here"])
def test_a_file_or_folder_that_may_not_be_read_is_named(shared, name):
    write(shared / "here/x.jsonl", [PAIR])
    (shared / "here/more").mkdir()
    with closed(shared / name), pytest.raises(DataError, match="; make it readable") as refused:
        load("preferences", str(shared / "here"))
    assert str(refused.value).startswith(f"cannot read {shared / name}: Permission denied; ")


def test_an_unreadable_file_is_no_traceback(tmp_path, capsys):
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "x.jsonl")
    assert main(["eval", "--benchmark", "preferences", "--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert f"cannot read {tmp_path / 'x.jsonl'}: Too many levels" in capsys.readouterr().err


def test_files_without_a_case_are_not_prepared(tmp_path, capsys):
    write(tmp_path / "x/filtered.json", [PAIR | {"subset": "anthropic"}])
    asked = ["prepare", "--benchmark", "reward_bench", "--data", str(tmp_path / "x"), "--output", str(tmp_path / "out")]
    assert main(asked) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path / 'x'} has no cases of reward_bench: give the official files" in said
    assert not prepared.is_prepared(str(tmp_path / f"out/reward_bench/{prepared.VERSION}"))
    write(tmp_path / "x/filtered.json", [PAIR])
    assert main(asked) == 0  # nothing of the first try is in the way
