"""Examples from JSON Lines and verdicts to JSON Lines: every bad row named, every run resumable."""

import gzip
import io
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grm_jax.data import jsonl, output
from grm_jax.datatypes import Example, Judgment, Message, Usage, Verdict

RUN = {"model": "tiny", "votes": 2, "seed": 0, "temperature": 0.5}
PACKAGE = Path(jsonl.__file__).parent.parent


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def examples_named(*ids: str) -> list[Example]:
    return [Example(id, (Message("user", "q"),), ("a", "b")) for id in ids]


def verdict_of(id: str, text: str = "fine") -> Verdict:
    judgments = (
        Judgment(text, (7, 3), None, (1, 0), False, 12, -3.25),
        Judgment("no box", None, "no box in the text", (0, 1), True, 9, -1.0),
    )
    return Verdict(id, (7.0, 3.0), 0, False, 2, 1, judgments, Usage(100, 21, 0.5))


def ids_in(path: str) -> list[str]:
    return [json.loads(line)["id"] for line in Path(path).read_bytes().splitlines()]


# Reading


def test_rows_of_every_form(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    answer = [{"role": "assistant", "content": "no", "tokens": 3}]
    path = write(
        tmp_path / "in.jsonl",
        {"id": "a", "prompt": "q", "responses": ["x", ""], "reference": "r", "scores": [1, 0.5], "extra": {"k": 1}},
        {"id": 7, "messages": chat, "responses": ["x"], "strength": 2, "source": "ours", "reference": None},
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"chosen": [*chat, {"role": "assistant", "content": "yes"}], "rejected": [*chat, *answer], "scores": [9, 2]},
        {"prompt": chat, "chosen": "yes", "rejected": answer, "responses": None, "reference": ""},
    )
    query, conversation = (Message("user", "q"),), (Message("system", "s"), Message("user", "q"))
    assert jsonl.read_examples(path, skip_bad=False) == (
        [
            Example("a", query, ("x", ""), (1.0, 0.5), "r"),
            Example("7", conversation, ("x",), None, None, 2.0, "ours"),
            Example("row-3", query, ("yes", "no"), (1.0, 0.0)),
            Example("row-4", conversation, ("yes", "no"), (9.0, 2.0)),
            Example("row-5", conversation, ("yes", "no"), (1.0, 0.0)),
        ],
        [],
    )


GOOD = {"id": "ok", "prompt": "q", "responses": ["x"]}
TURN = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("row", "value", "rule"),
    [
        ('{"prompt": "q", "responses": ["x"]', '[\\"x\\"]"', "one line of JSON (Expecting"),
        ('["q"]', '["q"]', "a row is a JSON object"),
        ("[" * 100_000, "[[[", "one line of JSON (maximum recursion"),
        ('{"prompt": "q", "responses": ["x"], "scores": [NaN]}', "q", "NaN is no number"),
        ('{"prompt": "q", "responses": ["x"], "scores": [' + "1" * 5000 + "]}", "q", "one line of JSON (Exceeds"),
        ('{"prompt": "q", "responses": ["x"], "scores": [1e999]}', "Infinity", "'scores' is a finite number"),
        ('{"prompt": "q \\ud83d", "responses": ["x"]}', "ud83d", "'prompt' holds half a surrogate pair"),
        ({"prompt": "q"}, '["prompt"]', "either 'responses', or 'chosen' and 'rejected'"),
        (GOOD | {"chosen": "a", "rejected": "b"}, "chosen", "either 'responses', or"),
        ({"prompt": "q", "chosen": "a"}, '"chosen"', "either 'responses', or"),
        (GOOD | {"responses": []}, "[]", "'responses' is a list that is not empty"),
        (GOOD | {"responses": "x"}, '"x"', "'responses' is a list"),
        (GOOD | {"responses": ["x", 3]}, "3", "'responses' is a string"),
        ({"responses": ["x"]}, '["responses"]', "either 'prompt' or 'messages'"),
        (GOOD | {"messages": [TURN]}, "prompt", "either 'prompt' or 'messages'"),
        (GOOD | {"prompt": 5}, "5", "'prompt' is a string"),
        (GOOD | {"prompt": " \n"}, '" \\n"', "ends with a turn of the user, which is not blank"),
        ({"messages": [], "responses": ["x"]}, "[]", "'messages' is a list that is not empty"),
        ({"messages": "q", "responses": ["x"]}, '"q"', "'messages' is a list"),
        ({"messages": ["q"], "responses": ["x"]}, '"q"', "object with 'role' and 'content'"),
        ({"messages": [{"role": "user"}], "responses": ["x"]}, '{"role"', "object with 'role' and 'content'"),
        ({"messages": [TURN | {"role": "human"}], "responses": ["x"]}, "human", "one of system, user, assistant"),
        ({"messages": [TURN | {"role": ["user"]}], "responses": ["x"]}, '["user"]', "one of system, user"),
        ({"messages": [TURN | {"content": None}], "responses": ["x"]}, "null", "'messages: content' is a string"),
        ({"messages": [TURN, REPLY], "responses": ["x"]}, "assistant", "ends with a turn of the user"),
        ({"chosen": "a", "rejected": "b"}, "rejected", "a row has a conversation"),
        ({"prompt": "q", "chosen": [TURN], "rejected": "b"}, '"user"', "the last turn of 'chosen' is the assistant's"),
        ({"prompt": "p", "chosen": [TURN, REPLY], "rejected": "b"}, '"q"', "answer one conversation"),
        ({"chosen": [TURN, REPLY], "rejected": [TURN, REPLY, TURN, REPLY]}, '"q"', "answer one conversation"),
        (GOOD | {"scores": [1, 2]}, "[1, 2]", "one number a response, here 1"),
        (GOOD | {"scores": [True]}, "true", "'scores' is a finite number"),
        (GOOD | {"strength": "much"}, '"much"', "'strength' is a finite number"),
        (GOOD | {"reference": ["r"]}, '["r"]', "'reference' is a string"),
        (GOOD | {"source": 1}, "1", "'source' is a string"),
        (GOOD | {"id": ""}, '""', "'id' is a string that is not empty"),
        (GOOD | {"id": 1.5}, "1.5", "'id' is a string that is not empty"),
        (GOOD | {"id": "first"}, '"first"', "ids are unique, and line 1 has this one"),
    ],
)
def test_a_bad_row_is_named_with_file_line_value_and_rule(tmp_path, row, value, rule):
    path = write(tmp_path / "in.jsonl", GOOD | {"id": "first"}, "", row, GOOD | {"id": "last"})
    with pytest.raises(jsonl.DataError, match=r"1 bad rows.*--skip-bad") as caught:
        jsonl.read_examples(path, skip_bad=False)
    (bad,) = caught.value.bad
    assert (bad.file, bad.line) == (path, 3)
    assert value in bad.value
    assert len(bad.value) <= 60
    assert rule in bad.rule
    assert f"{path}:3: {bad.rule}; found {bad.value}" in str(caught.value)
    examples, rows = jsonl.read_examples(path, skip_bad=True)
    assert [example.id for example in examples] == ["first", "last"]
    assert rows == [bad]


def test_all_bad_rows_are_collected_and_twenty_listed(tmp_path):
    path = write(tmp_path / "in.jsonl", GOOD, *[{"prompt": i} for i in range(25)])
    with pytest.raises(jsonl.DataError, match="25 bad rows") as caught:
        jsonl.read_examples(path, skip_bad=False)
    assert [bad.line for bad in caught.value.bad] == list(range(2, 27))
    assert f"{path}:21: " in str(caught.value)
    assert f"{path}:22: " not in str(caught.value)
    assert "and 5 more" in str(caught.value)
    with pytest.raises(jsonl.DataError, match="no good row is left"):
        jsonl.read_examples(write(tmp_path / "bad.jsonl", "{}"), skip_bad=True)


def test_marks_line_ends_and_bytes(tmp_path):
    path = tmp_path / "in.jsonl"
    row = json.dumps(GOOD | {"id": None, "responses": ["é\u2028\x85"]}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n \t\r\n" + row)
    examples, _ = jsonl.read_examples(str(path), skip_bad=False)
    assert [(e.id, e.responses) for e in examples] == [("row-1", ("é\u2028\x85",)), ("row-3", ("é\u2028\x85",))]
    path.write_bytes(row + b"\n" + row.replace("é".encode(), b"\xe9") + b"\n")
    _, (bad,) = jsonl.read_examples(str(path), skip_bad=True)
    assert (bad.line, bad.rule) == (2, "a row is UTF-8 text")
    assert "xe9" in bad.value


def test_gzip_and_standard_input(tmp_path, monkeypatch):
    packed = tmp_path / "in.jsonl.gz"
    text = (json.dumps(GOOD) + "\n").encode()
    packed.write_bytes(gzip.compress(text))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert jsonl.read_examples(str(packed), False) == jsonl.read_examples("-", False)
    for broken in (gzip.compress(text)[:-9], text, b"\x1f\x8b\x08\x00" + b"\xff" * 20):
        packed.write_bytes(broken)
        with pytest.raises(jsonl.DataError, match=r"cannot read .*\.gz"):
            jsonl.read_examples(str(packed), skip_bad=True)


def test_files_without_examples(tmp_path, monkeypatch):
    for text in ("", "\n \n"):
        (tmp_path / "in.jsonl").write_text(text)
        with pytest.raises(jsonl.DataError, match="is empty"):
            jsonl.read_examples(str(tmp_path / "in.jsonl"), skip_bad=True)
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(jsonl.DataError, match=f"cannot read {path}: .*; give"):
            jsonl.read_examples(str(path), skip_bad=True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{")))
    with pytest.raises(jsonl.DataError, match="standard input:1: "):
        jsonl.read_examples("-", skip_bad=False)


def test_the_examples_of_the_package():
    examples, _ = jsonl.read_examples(str(PACKAGE / "examples" / "examples.jsonl"), skip_bad=False)
    assert {len(example.responses) for example in examples} == {1, 2, 3}
    assert any(example.messages[0].role == "system" and len(example.messages) > 2 for example in examples)
    assert any(example.reference for example in examples)
    for example in examples:
        assert example.scores is not None
        assert len(set(example.scores)) == len(example.scores)  # a clear difference in quality
        assert all(len(text.split()) < 60 for text in example.responses)
    # No slot always wins.
    assert len({example.scores.index(max(example.scores)) for example in examples if len(example.scores) == 2}) == 2


def test_import_is_light():
    heavy = "('jax', 'numpy', 'etils', 'jinja2', 'flax', 'fsspec')"
    code = f"import sys, grm_jax.data.jsonl, grm_jax.prompts; print([m for m in {heavy} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# Writing


def test_verdict_row_has_the_keys_of_the_output():
    row = output.verdict_row(verdict_of("a"))
    assert json.loads(json.dumps(row)) == {
        "id": "a",
        "scores": [7, 3],
        "best": 0,
        "tie": False,
        "votes": 2,
        "valid": 1,
        "judgments": [
            {"text": "fine", "scores": [7, 3], "order": [1, 0], "forced": False, "tokens": 12, "log_prob": -3.25},
            {"text": "no box", "scores": None, "reason": "no box in the text", "order": [0, 1]}
            | {"forced": True, "tokens": 9, "log_prob": -1.0},
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 21, "seconds": 0.5},
    }
    cut = replace(verdict_of("a"), scores=(1.5, 2.0), usage=Usage(1, 2, 0.12345, cut_tokens=4))
    assert output.verdict_row(cut)["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "seconds": 0.123,
        "cut_tokens": 4,
    }
    assert output.verdict_row(cut)["scores"] == [1.5, 2]


@given(st.permutations("abcdef"))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_come_in_input_order_as_soon_as_their_turn_is_there(tmp_path, arrival):
    path, examples = str(tmp_path / "out.jsonl"), examples_named(*"abcdef")
    with output.open_writer(path, examples, RUN, overwrite=True) as writer:
        for count in range(1, 7):
            writer.write(verdict_of(arrival[count - 1]))
            ready = list(itertools.takewhile(lambda id: id in arrival[:count], "abcdef"))  # noqa: B023
            assert ids_in(path) == ready  # on disk already, not in a buffer
            assert output.finished(path, examples, RUN) == set(arrival[:count])  # and so are those that wait
    assert not Path(f"{path}.ahead").exists()


def test_a_row_is_one_line_and_one_write(tmp_path, monkeypatch):
    path = str(tmp_path / "out.jsonl")
    text = "a\nb\r\u2028\u2029\x85\x0c é \\u2028"
    with output.open_writer(path, examples_named("a"), RUN) as writer:
        writer.write(verdict_of("a", text))
    (line,) = Path(path).read_text().splitlines()
    assert json.loads(line)["judgments"][0]["text"] == text
    assert "é" in line
    pieces = []
    put = output._row_by_row(
        type("Slow", (io.BytesIO,), {"write": lambda self, b: pieces.append(b[:4]) or len(b[:4])})(), "x"
    )
    put(b"0123456789")
    assert pieces == [b"0123", b"4567", b"89"]


def test_verdicts_that_the_run_does_not_expect(tmp_path):
    with output.open_writer(str(tmp_path / "out.jsonl"), examples_named("a", "b"), RUN) as writer:
        writer.write(verdict_of("b"))
        for id in ("b", "z"):
            with pytest.raises(ValueError, match=f"verdict of '{id}'"):
                writer.write(verdict_of(id))
        with pytest.raises(ValueError, match="not JSON compliant"):
            writer.write(replace(verdict_of("a"), usage=Usage(1, 1, float("nan"))))


@pytest.mark.parametrize("half", ["", '{"id": "c", "sco', '{"id": "c"}'])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, half, caplog, monkeypatch):
    monkeypatch.setattr(output.logger, "propagate", True)
    path, examples = str(tmp_path / "new" / "folder" / "out.jsonl"), examples_named(*"abcd")
    with output.open_writer(path, examples, RUN) as writer:
        assert writer.finished == frozenset()
        for id in "abd":  # d waits for c
            writer.write(verdict_of(id, "first run"))
    with open(path, "a") as file:
        file.write(half)
    with open(f"{path}.ahead", "a") as file:
        file.write('{"id": "c", "sco')
    assert output.finished(path, examples, RUN) == {"a", "b", "d"}
    assert ids_in(path) == ["a", "b"]
    assert ("half-written" in caplog.text) == bool(half)
    with output.open_writer(path, examples, dict(reversed(RUN.items()))) as writer:
        assert writer.finished == {"a", "b", "d"}
        for id in "ad":
            with pytest.raises(ValueError, match=f"verdict of '{id}'"):
                writer.write(verdict_of(id))
        assert ids_in(f"{path}.ahead") == ["d"]
        writer.write(verdict_of("c", "second run"))
    assert ids_in(path) == list("abcd")
    assert (Path(path).read_text().count("first run"), Path(path).read_text().count("second run")) == (3, 1)
    assert sorted(file.name for file in Path(path).parent.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]
    assert output.finished(path, examples, RUN) == frozenset("abcd")
    with output.open_writer(path, examples, RUN | {"seed": 1}, overwrite=True) as writer:
        assert writer.finished == frozenset()
        assert Path(path).read_bytes() == b""
    with output.open_writer(path, examples, RUN) as writer:  # an empty output binds nobody
        assert writer.finished == frozenset()


def test_what_waits_is_kept_by_whole_examples_and_goes_with_overwrite(tmp_path):
    path, examples = str(tmp_path / "out.jsonl"), examples_named(*"abcd")
    rows = {id: [{"id": id, "row": j} for j in range(2)] for id in "abcd"}
    with output.open_writer(path, examples, RUN, each=2) as writer:
        for id in "bc":  # both wait for a
            writer.write(verdict_of(id), rows[id])
    ahead = Path(f"{path}.ahead")
    lines = ahead.read_text().splitlines(keepends=True)
    ahead.write_text("".join(lines[:3]))
    assert output.finished(path, examples, RUN, each=2) == {"b"}
    with pytest.raises(jsonl.DataError, match="begun with seed=0"):
        output.open_writer(path, examples, RUN | {"seed": 1}, each=2)
    with output.open_writer(path, examples, RUN, each=2) as writer:  # cut off within the rows of c
        assert ids_in(str(ahead)) == ["b", "b"]
        for id in "dca":
            writer.write(verdict_of(id), rows[id])
    assert [json.loads(line) for line in Path(path).read_text().splitlines()] == [
        row for id in "abcd" for row in rows[id]
    ]
    ahead.write_text("".join(lines))  # as if the run had been stopped before it was gone
    with output.open_writer(path, examples, RUN, each=2) as writer:
        assert writer.finished == set("abcd")
        assert not ahead.exists()
    ahead.write_text("".join(lines))
    output.open_writer(path, examples, RUN, overwrite=True, each=2).close()
    assert not ahead.exists()


def test_objects_that_wait_stand_beside_the_object_until_they_are_in_it(tmp_path, monkeypatch):
    """An object is written whole, so what waits goes when that has been done and not before."""
    place, now, written = tmp_path / "object", [0.0], []
    place.write_bytes(b"")
    monkeypatch.setattr(output, "path_of", lambda path: ObjectLike(path))
    ahead = output.Ahead(
        str(place), settle=lambda: written.append(Path(f"{place}.ahead").read_bytes()), clock=lambda: now[0]
    )
    ahead.keep(b"b\n")
    assert not Path(f"{place}.ahead").exists()
    now[0] = 31.0
    ahead.keep(b"c\n")
    assert Path(f"{place}.ahead").read_bytes() == b"b\nc\n"
    ahead.keep(b"d\n")
    ahead.close()
    assert ahead.read() == b"b\nc\nd\n"
    later = output.Ahead(str(place))
    later.begin({"b": b"b\n", "c": b"c\nd\n"})  # goes on: nothing is gone until it is written anew
    assert later.read() == b"b\nc\nd\n"
    later.begin({"b": b"b\n"})
    assert later.read() == b"b\n"
    later.keep(b"c\nd\n")
    later.close()
    ahead.clear()
    assert written == [b"b\nc\nd\n"]
    assert not Path(f"{place}.ahead").exists()


class ObjectLike:
    """A file behind an object's methods."""

    def __init__(self, path):
        for name in ("exists", "read_bytes", "write_bytes", "unlink"):
            setattr(self, name, getattr(Path(path), name))


def test_an_output_of_another_run_is_refused(tmp_path):
    path, examples = str(tmp_path / "out.jsonl"), examples_named(*"abc")
    with output.open_writer(path, examples, RUN) as writer:
        writer.write(verdict_of("a"))
    kept = Path(path).read_bytes()

    def refused(match: str, examples=examples, run=RUN) -> None:
        for open_it in (output.finished, output.open_writer):
            with pytest.raises(jsonl.DataError, match=match) as caught:
                open_it(path, examples, run)
            assert "--overwrite" in str(caught.value)

    refused("begun with seed=0, top_k=None; this run has seed=3, top_k=5:", run=RUN | {"seed": 3, "top_k": 5})
    refused("another input", examples=examples[::-1])
    refused("another input", examples=[*examples[:2], replace(examples[2], reference="r")])
    assert Path(path).read_bytes() == kept
    for line, match in (
        ('{"id": "z"}\n', r"out.jsonl:2: id 'z' is not in the input"),
        ('{"id": "c"}\n', r"out.jsonl:2: id 'c' is out of its place"),
        ('{"id": "a"}\n', r"out.jsonl:2: id 'a' is out of its place"),
        ('{"id": "b"}\n{"id": "c"}\n{"id": "c"}\n', r"out.jsonl:4: id 'c' is out of its place"),
        ('{"id": \n{"id": "c"', r"out.jsonl:2: no row of verdicts"),
        ('["b"]\n', r"out.jsonl:2: no row of verdicts"),
        ('{"ID": "b"}\n', r"out.jsonl:2: no row of verdicts"),
    ):
        Path(path).write_bytes(kept + line.encode())
        refused(match)
        assert Path(path).read_bytes() == kept + line.encode()
    for record in ("", "{}", "[]", '{"settings": 3, "input": ""}'):
        Path(path + ".run.json").write_text(record)
        refused("no record of its run")
    Path(path + ".run.json").unlink()
    Path(path).write_text("my notes, no line end")
    refused("no record of its run")
    assert Path(path).read_text() == "my notes, no line end"


def test_the_record_stands_before_the_first_row_and_old_rows_never_beside_a_new_one(tmp_path, monkeypatch):
    path, examples = str(tmp_path / "out.jsonl"), examples_named("a")
    with output.open_writer(path, examples, RUN) as writer:
        assert json.loads(Path(path + ".run.json").read_text())["settings"] == RUN
        writer.write(verdict_of("a"))

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "_record", crash)
    with pytest.raises(KeyboardInterrupt):
        output.open_writer(path, examples, RUN | {"votes": 8}, overwrite=True)
    assert Path(path).read_bytes() == b""
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "out.jsonl.run.json"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "out.jsonl", Path("/proc/nowhere/out.jsonl")):
        with pytest.raises(jsonl.DataError, match=f"cannot write {path}: .*--output"):
            output.open_writer(str(path), examples_named("a"), RUN)
    with (
        pytest.raises(jsonl.DataError, match="cannot write to /dev/full: No space"),
        output.open_writer("/dev/full", examples_named("a"), RUN) as writer,
    ):
        writer.write(verdict_of("a"))
    assert not Path("/dev/full.run.json").exists()


def test_standard_output_is_written_once_and_left_open(tmp_path, monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))
    monkeypatch.chdir(tmp_path)
    with output.open_writer("-", examples_named("a", "b"), RUN) as writer:
        writer.write(verdict_of("a"))
        assert json.loads(out.getvalue())["id"] == "a"
    assert not sys.stdout.closed
    assert os.listdir(tmp_path) == []


def test_an_object_is_written_whole_from_time_to_time_and_at_the_end(tmp_path):
    place, now = tmp_path / "object", [0.0]
    place.write_bytes(b"old\n")
    put, close = output._as_a_whole(place, lambda: now[0])
    seen = []
    for second in (10, 29, 31, 40, 62):
        now[0] = float(second)
        put(b"%d\n" % second)
        seen.append(place.read_bytes())
    assert seen[0] == seen[1] == b"old\n"
    assert seen[2] == seen[3] == b"old\n10\n29\n31\n"
    assert seen[4] == b"old\n10\n29\n31\n40\n62\n"
    put(b"63\n")
    close()
    assert place.read_bytes() == b"old\n10\n29\n31\n40\n62\n63\n"
