"""Labelled items judged and written: rows that stand by themselves, runs that go on, parts that make the whole."""

import dataclasses
import io
import json
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from tiny import LLAMA, tiny_model

from grm_jax import Example, Message, judging, prompts
from grm_jax.config import JudgeSettings
from grm_jax.data.jsonl import DataError
from grm_jax.dealing import orders
from grm_jax.grm import Grm
from grm_jax.hosts import Share
from grm_jax.main import main
from grm_jax.recipes import Items, SampleConfig
from grm_jax.sampler import Completion
from grm_jax.spct import sample as sampling
from grm_jax.spct.sample import (
    Sample,
    judge_settings,
    read_samples,
    row_of,
    sample_items,
    sample_of,
    sample_part,
    tally,
)
from grm_jax.tokenizer import ByteTokenizer

VOTES = 3
HINT = "Hint: "


def item(id: str, *responses: str, best: int = 0, **fields) -> Example:
    labels = tuple(float(i == best) for i in range(len(responses)))
    return Example(id, (Message("user", "Which is longest?"),), responses, labels, **fields)


ITEMS = [
    item("pair", "long one", "short", source="lengths"),
    item("triple", "a", "bb", "cccc", best=2, source="lengths", strength=2.0),
    item("even", "xx", "yy", best=1, reference="yy"),
    item("wrong", "the longest", "best", best=1, source="trick"),
]
SINGLE = Example("single", (Message("user", "Say hi."),), ("hi",), (1.0,), source="binary")


def name_of(example: Example) -> str:
    return "single_binary" if len(example.responses) == 1 else "listwise"


@pytest.fixture(scope="module")
def grm() -> Grm:
    return Grm(tiny_model(dataclasses.replace(LLAMA, max_positions=8192)), ByteTokenizer(), "tiny")


def config(output: object = "unused.jsonl", **fields) -> SampleConfig:
    fields = {"votes": VOTES, "max_new_tokens": 12, "slots": 8} | fields
    return SampleConfig(items=Items(files=("items.jsonl",)), output=str(output), **fields)


def samples_of(grm: Grm, items: list[Example], hinted: bool = False, **fields) -> list[Sample]:
    found = sample_items(grm, items, name_of, judge_settings(config(**fields)), hinted)
    return [sample for _, samples in found for sample in samples]


def shown_in(prompt: str) -> list[str]:
    """The responses of a prompt, in the order shown."""
    return re.findall(r"\[The Begin of Response ?\d*\]\n(.*?)\n\[The End of Response", prompt, re.DOTALL)


@pytest.fixture
def prompts_of_lengths(monkeypatch) -> list[str]:
    """A judge that scores by length; the list fills with the prompts that it is shown, one a sample."""
    prompts_seen, tokenizer = [], ByteTokenizer()

    def sample(model, requests, *_):
        for request in requests:
            prompt = tokenizer.decode(request.prompt)
            numbers = ", ".join(str(len(text)) for text in shown_in(prompt))
            text = tuple(tokenizer.encode(f"Analysis: as measured.\nScores: \\boxed{{{numbers}}}"))
            for item, j in request.samples:
                prompts_seen.append(prompt)
                yield Completion(request, item, j, text, (-0.5,) * len(text), True, None, 0.0)

    monkeypatch.setattr(judging, "sample", sample)
    return prompts_seen


def test_a_row_holds_what_its_prompt_was_made_of(grm, monkeypatch):
    real, asked = judging.sample, {}

    def watched(model, requests, *rest):
        for completion in real(model, requests, *rest):
            asked[completion.item, completion.sample] = completion.request.prompt, completion.ended
            yield completion

    monkeypatch.setattr(judging, "sample", watched)
    found = samples_of(grm, [*ITEMS, SINGLE], seed=2)
    tokenizer = grm.need_tokenizer()
    assert {sample.ended for sample in found} == {True, False}
    assert {(s.id, s.sample) for s in found} == {(e.id, j) for e in [*ITEMS, SINGLE] for j in range(VOTES)}
    for sample in found:
        again = sample_of(json.loads(json.dumps(row_of(sample))))
        assert again == sample
        (original,) = [e for e in [*ITEMS, SINGLE] if e.id == again.id]
        assert again.example == original
        assert again.order == orders(again.id, len(original.responses), VOTES, 2)[again.sample]
        template = prompts.load_template(again.template)
        turns = prompts.render(again.example, again.order, template, controls=tokenizer.specials)
        prompt = tuple(tokenizer.encode(tokenizer.chat(turns)))
        assert (prompt, again.ended) == asked[judging.stable_hash(again.id), again.sample]
        assert (again.scores, again.correct, again.hinted) == (None, False, False)
        assert "boxed" in again.reason
        assert again.tokens <= 12


def test_rows_have_the_keys_of_the_output(grm, prompts_of_lengths):
    keys = {"id", "source", "messages", "responses", "labels", "order", "text", "scores", "correct", "hinted"}
    keys |= {"sample", "tokens", "ended", "template"}
    rows = {sample.id: row_of(sample) for sample in samples_of(grm, ITEMS)}
    assert set(rows["pair"]) == keys
    assert set(rows["triple"]) == keys | {"strength"}
    assert set(rows["even"]) == keys | {"reference"}
    assert rows["even"]["source"] is None
    assert rows["triple"]["messages"] == ({"role": "user", "content": "Which is longest?"},)
    assert rows["triple"]["responses"] == ("a", "bb", "cccc")
    assert rows["triple"]["scores"] == (1, 2, 4)  # by length, in the item's own order


def test_right_is_the_best_response_alone_on_top(grm, prompts_of_lengths):
    found = samples_of(grm, [*ITEMS, SINGLE], votes=5)
    for sample in found:
        best = sample.labels.index(max(sample.labels))
        others = [score for i, score in enumerate(sample.scores) if i != best]
        truth = sample.scores[0] == 1 if sample.id == "single" else all(sample.scores[best] > s for s in others)
        assert sample.correct == truth
    right = {id: {s.correct for s in found if s.id == id} for id in ("pair", "triple", "even", "wrong", "single")}
    assert right == {"pair": {True}, "triple": {True}, "even": {False}, "wrong": {False}, "single": {True}}


def test_each_item_is_shown_by_its_own_template(grm, prompts_of_lengths):
    found = samples_of(grm, [SINGLE, ITEMS[0]])
    assert {sample.id: sample.template for sample in found} == {"single": "single_binary", "pair": "listwise"}
    (binary,) = {text for text in prompts_of_lengths if "Say hi." in text}
    assert "the score is 1 when it is, 0 when it is not" in binary
    assert sum("the score is 1 when it is" in text for text in prompts_of_lengths) == VOTES


def test_a_hint_ends_the_prompt_and_is_in_no_row(grm, prompts_of_lengths):
    plain = samples_of(grm, [*ITEMS, SINGLE], votes=6)
    untold = set(prompts_of_lengths)
    prompts_of_lengths.clear()
    told = samples_of(grm, [*ITEMS, SINGLE], hinted=True, votes=6)
    assert len(untold) == len(set(prompts_of_lengths)) == 1 + 2 * 3 + 6
    for text in set(prompts_of_lengths):
        before, _, hint = text.rpartition("\n\n\n" + HINT)
        assert any(prompt.startswith(before) for prompt in untold)
        shown = shown_in(text)
        if shown == ["hi"]:
            assert "the true score of this response is 1." in hint
            continue
        (original,) = [e for e in ITEMS if set(e.responses) == set(shown)]
        best = original.responses[original.scores.index(1.0)]
        assert shown[int(re.search(r"response (\d) is the best", hint)[1]) - 1] == best
        assert ("a strength of preference of 2" in hint) == (original.id == "triple")
    assert all(sample.hinted and HINT not in json.dumps(row_of(sample)) for sample in told)
    assert [dataclasses.replace(sample, hinted=False) for sample in told] == plain


def test_a_prompt_cut_to_fit_keeps_room_for_its_hint(grm):
    short = dataclasses.replace(grm.model.config, max_positions=4096)
    small = dataclasses.replace(grm, model=dataclasses.replace(grm.model, config=short))
    long = item("long", "x" * 6000, "y", strength=3.0)
    settings = judge_settings(config(votes=2, max_new_tokens=4))
    (untold,) = small.judge([long], settings)
    (told,) = small.judge([long], settings, hint_of=lambda _: prompts.Hint(best=0, strength=3.0))
    assert told.usage.cut_tokens > untold.usage.cut_tokens
    for verdict in (untold, told):
        assert 2 * 3900 < verdict.usage.prompt_tokens <= 2 * (4096 - 4)


def test_a_template_without_a_place_for_the_hint_is_refused(grm, tmp_path):
    (tmp_path / "mine.txt").write_text(re.sub(r"\{%- if hint.*endif %\}", "", SOURCE, flags=re.DOTALL))
    with pytest.raises(ValueError, match="does not show 'hint'; add it, or sample without hints"):
        list(sample_items(grm, ITEMS[:1], lambda _: str(tmp_path / "mine.txt"), judge_settings(config()), True))
    with pytest.raises(ValueError, match="force_scores = True"):
        list(sample_items(grm, ITEMS[:1], name_of, JudgeSettings(), False))


SOURCE = (prompts.TEMPLATES / "listwise.txt").read_text()


def test_an_interrupted_run_goes_on_and_ends_in_the_same_rows(grm, tmp_path, monkeypatch):
    whole, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    judged = []

    def run(path: Path) -> dict[str, Counter]:
        judged.clear()
        return sample_part(config(path), ITEMS, name_of, Share(0, 1, True), lambda: grm)

    real = Grm.judge
    monkeypatch.setattr(Grm, "judge", lambda self, e, *rest: judged.extend(e) or real(self, e, *rest))
    tallies = run(whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == [e.id for e in ITEMS for _ in range(VOTES)]
    for kept in (b"".join(lines[:4]), b"".join(lines[:7]) + lines[7][:50], b"".join(lines[:6]), lines[0][:-1]):
        again.write_bytes(kept)  # killed between two rows of an item, within a row, between two items
        Path(f"{again}.run.json").write_text(Path(f"{whole}.run.json").read_text())
        assert run(again) == tallies, "the report is of the whole file"
        assert again.read_bytes() == whole.read_bytes()
        assert judged == ITEMS[kept.count(b"\n") // VOTES :]
    again.write_bytes(b"".join(lines[:3]))
    Path(f"{again}.ahead").write_bytes(b"".join(lines[6:9]))  # the third item was ready before its turn
    assert run(again) == tallies
    assert again.read_bytes() == whole.read_bytes()
    assert judged == [ITEMS[1], *ITEMS[3:]]
    assert run(again) == tallies
    assert judged == []
    with pytest.raises(DataError, match="begun with hinted=False; this run has hinted=True"):
        sample_part(config(again, hinted=True), ITEMS, name_of, Share(0, 1, True), lambda: grm)


def test_the_parts_of_two_processes_make_the_whole(grm, tmp_path, prompts_of_lengths):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    items = [*ITEMS, SINGLE]
    counts = sample_part(config(whole), items, name_of, Share(0, 1, True), lambda: grm)
    first = sample_part(config(parts), items, name_of, Share(0, 2, True), lambda: grm)
    with pytest.raises(DataError, match=r"found parts\.jsonl-00000-of-00002; samples are one file or all parts"):
        read_samples(str(parts))
    second = sample_part(config(parts), items, name_of, Share(1, 2, True), lambda: grm)
    found = sorted(path.name for path in tmp_path.glob("parts*") if path.suffix != ".json")
    assert found == ["parts.jsonl-00000-of-00002", "parts.jsonl-00001-of-00002"]
    assert read_samples(str(parts)) == read_samples(str(whole))
    together = Counter()
    for counter in (*first.values(), *second.values()):
        together.update(counter)
    assert together == sum(counts.values(), Counter())
    (tmp_path / "parts.jsonl").write_bytes(whole.read_bytes())
    with pytest.raises(DataError, match="samples are one file or all parts of one run"):
        read_samples(str(parts))
    with pytest.raises(DataError, match=r"no .*absent\.jsonl, and no parts of it"):
        read_samples(str(tmp_path / "absent.jsonl"))
    whole.write_bytes(whole.read_bytes() + b'{"id": "x"}\n')
    with pytest.raises(DataError, match=r"whole\.jsonl:16: no sample \(KeyError: 'source'\)"):
        read_samples(str(whole))


def test_the_report_worked_by_hand(grm, prompts_of_lengths):
    found = {id: [s for s in samples_of(grm, ITEMS) if s.id == id] for id in ("pair", "even", "wrong")}
    assert tally(found["pair"]) == Counter(items=1, judgments=3, correct=3, longer=1.0)
    assert tally(found["even"]) == Counter(items=1, judgments=3, ties=3, longer=0.5)
    assert tally(found["wrong"]) == Counter(items=1, judgments=3)
    unparsed = [dataclasses.replace(found["pair"][0], scores=None, correct=False), *found["pair"][1:]]
    assert tally(unparsed) == Counter(items=1, judgments=3, correct=2, unparsed=1, longer=1.0)
    out = io.StringIO()
    sampling.show({"a": tally(unparsed), "b": tally(found["even"])}, Console(file=out, width=120))
    shown = [re.findall(r"[\w.%]+", line) for line in out.getvalue().splitlines()]
    assert ["a", "1", "3", "66.7%", "33.3%", "0.0%", "100.0%"] in shown
    assert ["b", "1", "3", "0.0%", "0.0%", "100.0%", "50.0%"] in shown
    assert ["all", "2", "6", "33.3%", "16.7%", "50.0%", "75.0%"] in shown


# The command


@pytest.fixture
def files(tmp_path) -> Path:
    path = tmp_path / "items.jsonl"
    rows = [dataclasses.asdict(e) for e in [*ITEMS, SINGLE]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(files: Path, *more: str) -> int:
    fast = ["--votes", "3", "--max-new-tokens", "12", "--items.n-choices", "2", "3"]
    place = files.parent
    return main(
        [
            "sample",
            "--items.files",
            str(files),
            "--output",
            str(place / "out.jsonl"),
            "--model",
            str(place),
            *fast,
            *more,
        ]
    )


def test_the_command_writes_samples_and_reports_by_source(grm, files, prompts_of_lengths, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "load", lambda model, dtype, mesh: grm)
    monkeypatch.setattr(sampling, "check_decoder", lambda model, scalar: None)
    assert command(files) == 0
    found = read_samples(str(files.parent / "out.jsonl"))
    assert Counter(s.id for s in found) == {e.id: 3 for e in [*ITEMS, SINGLE]}
    assert {s.id: s.template for s in found}["single"] == "single_binary"
    assert not any(HINT in text for text in prompts_of_lengths)
    report = capsys.readouterr().err
    assert re.search(r"lengths\W+2\W+6\W+100.0%", report)
    assert re.search(r"all\W+5\W+15\W+60.0%", report)
    assert command(files, "--hinted") == 2
    assert "hinted=False; this run has hinted=True" in capsys.readouterr().err
    prompts_of_lengths.clear()
    assert command(files, "--hinted", "--overwrite") == 0
    assert all(HINT in text for text in prompts_of_lengths)
    assert all(s.hinted for s in read_samples(str(files.parent / "out.jsonl")))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "/no/such/model"], "/no/such/model does not exist"),
        (["--items.files", "no-such-file.jsonl"], "cannot read no-such-file.jsonl"),
        (["--template", "no-such-template"], "no template 'no-such-template'"),
        (["--output", "ITEMS"], "is one of items.files: samples would overwrite the examples"),
        (["--votes", "0"], "votes = 0"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(files, more, message, capsys, monkeypatch):
    monkeypatch.setattr(sampling, "load", partial(pytest.fail, "a model was loaded"))
    assert command(files, *[str(files) if part == "ITEMS" else part for part in more]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert not (files.parent / "out.jsonl").exists()


def test_help_imports_nothing_heavy():
    code = "import sys; from grm_jax.main import main; main(['sample', '--help']); print({'jax', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--items.files" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"
