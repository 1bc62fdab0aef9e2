"""What `convert` writes, loaded by transformers: its logits and its tokenizer's ids are those from here. On demand.

    GRM_PEERS_PYTHON=ENV/peers/bin/python python -m pytest -m slow tests/test_convert_transformers.py

The interpreter named there has torch and transformers (tests/peers/README.md), which are no part of the tests' environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from checkpoints import FAMILIES, GOLDENS, assert_same, load
from test_convert import converted, trained
from test_save import SOME, adapters_of, drawn
from tiny import GEMMA, LLAMA, QWEN3

import grm_jax
from grm_jax import scalar_rm
from grm_jax.models import lora
from grm_jax.recipes import Lora
from grm_jax.tokenizer import ByteTokenizer
from grm_jax.weights.adapters import save_adapters
from grm_jax.weights.decoder import load_decoder
from grm_jax.weights.save import save_hf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("GRM_PEERS_PYTHON"), reason="GRM_PEERS_PYTHON names no Python with transformers"
    ),
]
TEXTS = ["Hello, world! 12", "Hé 世界", "a\n\n b<|eos|>"]
PROGRAM = """
import json, sys
import numpy as np
import torch
import transformers
folder, ids, out, scalar, texts = sys.argv[1:]
transformers.logging.set_verbosity_error()
kind = transformers.AutoModelForSequenceClassification if scalar == "1" else transformers.AutoModelForCausalLM
model, told = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
with torch.no_grad():
    logits = model.eval()(torch.from_numpy(np.load(ids))).logits
np.save(out, logits.numpy())
if texts != "[]":
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    print(json.dumps([tokenizer(text, add_special_tokens=False).input_ids for text in json.loads(texts)]))
"""


def in_transformers(
    folder: Path, ids: np.ndarray, scalar: bool = False, texts: list[str] = ()
) -> tuple[np.ndarray, list]:
    """Logits of the folder's model, and its tokenizer's ids of texts."""
    where, out = folder.parent / f"{folder.name}-ids.npy", folder.parent / f"{folder.name}-logits.npy"
    np.save(where, ids.astype(np.int64))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [os.environ["GRM_PEERS_PYTHON"], "-c", PROGRAM, folder, where, out, str(int(scalar)), json.dumps(list(texts))],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return np.load(out), json.loads(done.stdout.splitlines()[-1]) if texts else []


def ids_of(vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, vocabulary, (2, 20))


def logits_here(folder: Path, ids: np.ndarray) -> np.ndarray:
    return np.asarray(grm_jax.load(str(folder), dtype="float32").logits(ids))


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    assert expected.std() > 0.3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    """Through Orbax, and in several files."""
    kept = converted(GOLDENS / family, tmp_path / "orbax", "--to", "orbax")
    out, ids = converted(kept, tmp_path / "out", "--shard-gb", "2e-5"), ids_of(96)
    found, _ = in_transformers(out, ids)
    assert_near(logits_here(out, ids), found)
    np.testing.assert_array_equal(logits_here(out, ids), logits_here(GOLDENS / family, ids))


def test_a_scalar_head(tmp_path: Path) -> None:
    out, ids = converted(GOLDENS / "gemma2_classifier", tmp_path / "out"), ids_of(96)
    found, _ = in_transformers(out, ids, scalar=True)
    model, _ = load_decoder(str(out), "float32")
    rows = [(row[:5].tolist(), row[5:].tolist()) for row in ids]
    assert abs(found[0, 0] - found[1, 0]) > 0.1
    np.testing.assert_allclose(scalar_rm.scalars(model, rows), found[:, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "gemma", "adapters", "run", "run with adapters"])
def test_what_is_made_here(tmp_path: Path, name: str) -> None:
    """Models of our own config.json and tokenizer files; adapters merged; steps of training runs."""
    base, config = tmp_path / "base", {"gemma": GEMMA, "run": QWEN3}.get(name, LLAMA)
    params = {n: v * (0.1 if v.ndim > 1 else 1) for n, v in drawn(config).items()}
    save_hf(base, config, params, ByteTokenizer(), None, "float32")
    source, expected = base, params
    if name == "adapters":
        source = tmp_path / "adapters"
        adapters = {n: 0.1 * v for n, v in adapters_of(LLAMA).items()}
        save_adapters(source, LLAMA, adapters, SOME, str(base))
        expected = lora.merge(params, adapters, SOME)
    if name.startswith("run"):
        source = tmp_path / "run"
        models = trained(source, str(base), Lora(rank=2) if "adapters" in name else Lora(), scale=0.4)
        expected = load(models[4])
    out, ids = converted(source, tmp_path / "out"), ids_of(256)
    found, tokens = in_transformers(out, ids, texts=TEXTS)
    assert_near(logits_here(out, ids), found)
    assert_same(load(out), expected)
    tokenizer = ByteTokenizer()
    assert tokens == [tokenizer.encode(text) for text in TEXTS]


def test_the_embedded_model(tmp_path: Path) -> None:
    out = converted("smollm2-135m", tmp_path / "out", "--shard-gb", "0.2")
    grm = grm_jax.load("smollm2-135m", dtype="float32")
    tokenizer = grm.need_tokenizer()
    ids = np.array([tokenizer.encode("Why is the sky blue? Because of Rayleigh scattering.")])
    found, tokens = in_transformers(out, ids, texts=TEXTS)
    np.testing.assert_allclose(np.asarray(grm.logits(ids)), found, rtol=0, atol=1e-3)
    assert tokens == [tokenizer.encode(text) for text in TEXTS]
