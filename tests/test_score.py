"""The command line, from a file of examples to a file of verdicts, with a tiny checkpoint made here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import LLAMA
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from grm_jax.main import main
from grm_jax.models.decoder import random_params
from grm_jax.prompts import TEMPLATES
from grm_jax.vocab import byte_symbols

ROWS = [
    {"id": "pair", "prompt": "What is 7 x 8?", "chosen": "56", "rejected": "54"},
    {
        "id": "three",
        "messages": [{"role": "user", "content": "Name a fruit."}],
        "responses": ["Apple", "Chair", "Pear"],
    },
    {"id": "one", "prompt": "Say hello.", "responses": ["Hello!"], "reference": "Hi"},
    {"id": "last", "prompt": "Say bye.", "responses": ["Bye!", "No."]},
]
FAST = ["--votes", "3", "--max-new-tokens", "12", "--slots", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder: two random layers and a tokenizer of single bytes."""
    place = tmp_path_factory.mktemp("tiny")
    config = {
        "model_type": "llama",
        "vocab_size": LLAMA.vocab_size,
        "hidden_size": LLAMA.dim,
        "num_hidden_layers": LLAMA.layers,
        "num_attention_heads": LLAMA.heads,
        "head_dim": LLAMA.head_dim,
        "num_key_value_heads": LLAMA.kv_heads,
        "intermediate_size": LLAMA.mlp_dim,
        "rms_norm_eps": LLAMA.norm_eps,
        "rope_theta": LLAMA.rope_theta,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "eos_token_id": 257,
        "bos_token_id": 256,
    }
    (place / "config.json").write_text(json.dumps(config))
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    names |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    names |= {"norm_attention": "input_layernorm", "norm_mlp": "post_attention_layernorm"}
    params = {path: np.asarray(value) for path, value in random_params(LLAMA, 0).items()}
    tensors = {"model.embed_tokens.weight": params["embed"]}
    for path, array in params.items():
        if path.startswith("layers."):
            _, layer, *_, name = path.split(".")
            flat = array.reshape(LLAMA.dim, -1) if name == "o" else array.reshape(-1, *array.shape[-1:])
            flat = array if array.ndim == 1 else flat
            tensors[f"model.layers.{layer}.{names[name]}.weight"] = flat
    tensors["model.norm.weight"] = np.ones(LLAMA.dim, np.float32)
    save_file(tensors, place / "model.safetensors")
    vocab = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|bos|>", "<|eos|>", "<|pad|>")])
    tokenizer.save(str(place / "tokenizer.json"))
    return place


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run(folder, source, target, *more) -> int:
    return main(["score", "--model", str(folder), "--input", str(source), "--output", str(target), *FAST, *more])


def verdicts(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for row in found:
        del row["usage"]["seconds"]
    return found


def test_rows_go_in_and_verdicts_come_out_in_their_order(folder, rows, tmp_path):
    assert run(folder, rows, tmp_path / "out" / "verdicts.jsonl") == 0
    found = verdicts(tmp_path / "out" / "verdicts.jsonl")
    assert [row["id"] for row in found] == ["pair", "three", "one", "last"]
    for row, n in zip(found, (2, 3, 1, 2), strict=True):
        assert set(row) == {"id", "scores", "best", "tie", "votes", "valid", "judgments", "usage"}
        assert (len(row["scores"]), row["votes"], row["valid"], len(row["judgments"])) == (n, 3, 3, 3)
        for judgment in row["judgments"]:
            assert set(judgment) == {"text", "scores", "order", "forced", "tokens", "log_prob"}
            assert sorted(judgment["order"]) == list(range(n))
        assert row["scores"] == [sum(scores) for scores in zip(*(j["scores"] for j in row["judgments"]), strict=True)]
        assert row["usage"]["completion_tokens"] == sum(j["tokens"] for j in row["judgments"])


def log_probs(path: Path) -> list[float]:
    return [judgment["log_prob"] for row in verdicts(path) for judgment in row["judgments"]]


def without_log_probs(path: Path) -> list[dict]:
    found = verdicts(path)
    for row in found:
        for judgment in row["judgments"]:
            del judgment["log_prob"]
    return found


def test_an_interrupted_run_goes_on_and_ends_in_the_same_rows(folder, rows, tmp_path, capsys):
    whole, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    assert run(folder, rows, whole) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    again.write_bytes(lines[0] + lines[1][:40])  # killed in the second row
    Path(f"{again}.run.json").write_text(Path(f"{whole}.run.json").read_text())
    assert run(folder, rows, again) == 0
    assert again.read_bytes().splitlines()[0] == lines[0].strip(), "a finished row is not judged again"
    # Another batch rounds otherwise: texts and scores are the same, sums of log-probabilities to the last digits.
    assert without_log_probs(again) == without_log_probs(whole)
    for ours, theirs in zip(log_probs(again), log_probs(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    assert run(folder, rows, again, "--temperature", "0.9") == 2
    assert "temperature=0.5; this run has temperature=0.9" in capsys.readouterr().err
    assert run(folder, rows, again, "--temperature", "0.9", "--overwrite") == 0
    assert verdicts(again) != verdicts(whole)


def test_bad_rows_are_named_before_the_model_is_looked_at(rows, tmp_path, capsys):
    with rows.open("a") as file:
        file.write('{"prompt": "x", "responses": []}\n')
    assert run("/no/such/model", rows, tmp_path / "out.jsonl") == 2
    error = capsys.readouterr().err
    assert "rows.jsonl:5" in error
    assert "/no/such/model" not in error
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_that_the_template_has_no_place_for_are_named_before_the_model_is_looked_at(rows, tmp_path, capsys):
    template = tmp_path / "mine.txt"
    text = (TEMPLATES / "listwise.txt").read_text()
    start, end = text.index("{% if reference is not none %}"), text.index("{% endif %}") + len("{% endif %}")
    template.write_text(text[:start] + text[end:])
    assert run("/no/such/model", rows, tmp_path / "out.jsonl", "--template", str(template)) == 2
    error = capsys.readouterr().err
    assert "1 rows do not fit the template" in error
    assert "does not show 'reference', which 'one' has" in error
    assert run("/no/such/model", rows, tmp_path / "out.jsonl", "--template", str(template), "--skip-bad") == 2
    error = capsys.readouterr().err
    assert "1 rows that do not fit the template left out" in error
    assert "/no/such/model does not exist" in error


def test_a_mistyped_model_leaves_the_old_verdicts_alone(rows, tmp_path):
    old = tmp_path / "out.jsonl"
    old.write_text("{}\n")
    assert run("/no/such/model", rows, old, "--overwrite") == 2
    assert old.read_text() == "{}\n"


def test_skip_bad_leaves_them_out_and_says_so(folder, rows, tmp_path, capsys):
    with rows.open("a") as file:
        file.write("{broken\n")
    assert run(folder, rows, tmp_path / "out.jsonl", "--skip-bad") == 0
    assert len(verdicts(tmp_path / "out.jsonl")) == 4
    assert "1 bad rows left out" in capsys.readouterr().err


def test_show_prints_judgments_and_votes(folder, rows, tmp_path, capsys):
    assert run(folder, rows, tmp_path / "out.jsonl", "--show") == 0
    shown = capsys.readouterr().out
    assert "What is 7 x 8?" in shown
    assert "Apple" in shown
    assert "* forced" in shown


def test_standard_input_and_output(folder):
    command = [
        sys.executable,
        "-m",
        "grm_jax.main",
        "score",
        "--model",
        str(folder),
        "--input",
        "-",
        "--output",
        "-",
        *FAST,
    ]
    done = subprocess.run(command, input=json.dumps(ROWS[0]), capture_output=True, text=True, check=True)
    (row,) = map(json.loads, done.stdout.splitlines())
    assert row["id"] == "pair"
    assert "1 verdicts" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--votes", "0"], "votes = 0: it has to be at least 1"),
        (["--input", "no-such-file.jsonl"], "no-such-file.jsonl"),
        (["--template", "no-such-template"], "no template 'no-such-template'"),
        (["--input", "x.jsonl", "--output", "x.jsonl"], "input and output are both 'x.jsonl'"),
        (["--model", "/no/such/model"], "/no/such/model does not exist"),
    ],
)
def test_mistakes_end_with_code_2_and_say_the_rule(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["score", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())  # the parser's box wraps lines


def test_commands_that_there_are_not(capsys):
    assert main(["sore"]) == 2
    assert "'sore' is no command" in capsys.readouterr().err
    assert main(["bench", "train"]) == 2
    assert "known is `bench sample`" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0


@pytest.mark.slow
def test_bench_measures_every_row_of_its_table(folder, tmp_path, capsys):
    arguments = ["--prompt-tokens", "40", "--new-tokens", "6", "--batch", "1,2", "--votes=1,3", "--repeats", "1"]
    assert main(["bench", "sample", "--model", str(folder), "--json", str(tmp_path / "b.json"), *arguments]) == 0
    report = json.loads((tmp_path / "b.json").read_text())
    assert [(row["batch"], row["votes"]) for row in report["rows"]] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for row in report["rows"]:
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * row["votes"] * 6 / row["seconds"])
        assert row["decode_flops_share"] > 0
    assert report["ceilings"]["flops"] > 1e9
    assert "ceilings" in capsys.readouterr().out


def test_the_embedded_model_judges_the_packages_examples(tmp_path):
    """The main job, cut short: the real model, its own templates and demonstrations."""
    target = tmp_path / "verdicts.jsonl"
    source = tmp_path / "one.jsonl"
    source.write_text(json.dumps(ROWS[0]))
    arguments = ["--input", str(source), "--output", str(target), "--votes", "4", "--max-new-tokens", "64"]
    assert main(["score", *arguments]) == 0
    (row,) = verdicts(target)
    assert row["valid"] == 4
    assert all("Specific Criteria" in judgment["text"] for judgment in row["judgments"])


IN_A_BUCKET = """
import sys
from etils import epath
from grm_jax.main import main
rows, folder, *more = sys.argv[1:]
epath.Path("gs://judge/rows.jsonl").write_text(open(rows).read())
arguments = ["--input", "gs://judge/rows.jsonl", "--output", "gs://judge/out/verdicts.jsonl", "--model", folder, *more]
for again in range(2):
    code = main(["score", *arguments])
    if code:
        sys.exit(code)
print(epath.Path("gs://judge/out/verdicts.jsonl").read_text(), end="")
"""


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the emulator's sockets
def test_rows_and_verdicts_in_a_bucket(folder, rows, bucket):
    done = subprocess.run(
        [sys.executable, "-c", IN_A_BUCKET, str(rows), str(folder), *FAST],
        capture_output=True, text=True, env=os.environ | bucket, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [row["id"] for row in ROWS]
    assert "4 of 4 verdicts are in gs://judge/out/verdicts.jsonl already" in done.stderr
