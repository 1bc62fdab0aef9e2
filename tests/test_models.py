"""The decoder against transformers' float32 logits, kept as goldens (tests/goldens/make_logits.py makes them)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import FAMILIES, GOLDENS, load

from grm_jax.models.config import DecoderConfig, RopeScaling
from grm_jax.models.decoder import Cache, bind, rope_frequencies, split_abstract
from grm_jax.weights.embedded import find_embedded
from grm_jax.weights.load import read_config

SIDES = ["none", "left", "right"]


def load_model(path: Path) -> tuple[DecoderConfig, dict[str, jax.Array]]:
    return read_config(path), load(path)


def positions_of(real: np.ndarray) -> np.ndarray:
    """Positions count real tokens; -1 is padding."""
    return np.where(real, real.cumsum(-1) - 1, -1).astype(np.int32)


@functools.cache
def forward(config: DecoderConfig) -> Callable[..., tuple[jax.Array, Cache]]:
    """Logits and cache of new tokens, compiled once a config and shape."""
    graph, _ = split_abstract(config)

    @jax.jit
    def run(params, tokens, positions, cache):
        model = bind(graph, params)
        hidden, cache = model(tokens, positions, cache)
        return model.logits(hidden), cache

    return run


def logits_of(config: DecoderConfig, params: dict[str, jax.Array], tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
    return np.asarray(forward(config)(params, tokens, positions_of(real), Cache())[0])


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[DecoderConfig, dict[str, jax.Array]]]:
    return {family: load_model(GOLDENS / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(models, family: str) -> None:
    """Two or four random layers, windows of 8 over 20 tokens, soft-caps, rotary scaling: float32 to 1e-4."""
    golden = np.load(GOLDENS / family / "expected.npz")
    tokens, real, expected = (np.stack([golden[f"{side}_{x}"] for side in SIDES]) for x in ("tokens", "real", "logits"))
    found = logits_of(*models[family], tokens.reshape(-1, tokens.shape[-1]), real.reshape(-1, real.shape[-1]))
    for side, x, y, r in zip(SIDES, found.reshape(expected.shape), expected, real, strict=True):
        np.testing.assert_allclose(x[r], y[r], rtol=0, atol=1e-4, err_msg=f"padding: {side}")


@pytest.mark.parametrize("family", ["gemma2", "qwen2", "deepseek_v2"])  # windows on some layers; latents
def test_prefill_then_decode_equals_one_forward(models, family: str) -> None:
    """Keys of a prefix come back as a part of the cache; the rest of the row sees them through it, windows included."""
    config, params = models[family]
    golden = np.load(GOLDENS / family / "expected.npz")
    tokens, real = golden["left_tokens"], golden["left_real"]
    positions = positions_of(real)
    cut = 15
    head, cache = forward(config)(params, tokens[:, :cut], positions[:, :cut], Cache())
    tail, _ = forward(config)(params, tokens[:, cut:], positions[:, cut:], cache)
    found = np.concatenate([head, tail], axis=1)
    np.testing.assert_allclose(found[real], golden["left_logits"][real], rtol=0, atol=1e-4)


def changed(config: DecoderConfig, change: dict) -> DecoderConfig:
    """The config with some numbers changed, also those of its parts."""
    parts = {k: dataclasses.replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in change.items()}
    return dataclasses.replace(config, **parts)


YARN = {"factor": 8.0, "original_max_positions": 64, "attention_factor": 1.0, "beta_fast": 1.5, "beta_slow": 0.4}
# What a golden must notice if the decoder got it wrong: (family, a config with one number changed).
CHANGES = [
    ("llama", {"rope_scaling": None}),
    ("llama", {"rope_theta": 20_000.0}),
    ("llama", {"norm_eps": 1e-2}),
    ("llama", {"query_scale": 8**-0.5}),
    ("mistral", {"windows": (9, 9)}),
    ("qwen2", {"windows": (8, 8)}),
    ("qwen2", {"windows": (None, None)}),
    ("gemma2", {"windows": (None, 8, None, 8)}),
    ("gemma2", {"attention_softcap": None}),
    ("gemma2", {"logit_softcap": None}),
    ("gemma2", {"norm_offset": 0.0}),
    ("gemma2", {"embed_scale": 1.0}),
    ("gemma2", {"query_scale": 16**-0.5}),
    ("gemma2", {"activation": "silu"}),
    *(("deepseek_v2", {"rope_scaling": {name: value}}) for name, value in YARN.items()),
    ("deepseek_v2", {"query_scale": 20**-0.5}),
    ("deepseek_v2", {"latent": {"interleaved": False}}),
    ("deepseek_v2", {"latent": {"norm_eps": 1e-2}}),
    ("deepseek_v2", {"experts": {"normalised": True}}),
    ("deepseek_v2", {"experts": {"per_token": 2}}),
    ("deepseek_v2_groups", {"experts": {"groups": 1, "groups_kept": 1}}),
    ("deepseek_v2_groups", {"experts": {"group_top": 2}}),
    ("deepseek_v2_groups", {"experts": {"scale": 1.0}}),
    ("deepseek_v3", {"experts": {"sigmoid": False}}),
    ("deepseek_v3", {"experts": {"group_top": 1}}),
    ("deepseek_v3", {"experts": {"groups": 1, "groups_kept": 1, "group_top": 1}}),
    ("deepseek_v3", {"experts": {"normalised": False}}),
    ("qwen3_moe", {"experts": {"normalised": False}}),
    ("qwen3_moe", {"rope_scaling": {"attention_factor": 1.0}}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "change"), CHANGES)
def test_goldens_notice_every_number(models, family: str, change: dict) -> None:
    config, params = models[family]
    golden = np.load(GOLDENS / family / "expected.npz")
    real = golden["none_real"]
    found = logits_of(changed(config, change), params, golden["none_tokens"], real)
    assert np.abs(found - golden["none_logits"]).max() > 1e-2


def test_rope_scaling_by_hand() -> None:
    """Kept where a wavelength fits the original context high_freq_factor times, divided where it fits less than low."""
    theta, scaling = 10_000.0, RopeScaling(8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
    plain = np.asarray(rope_frequencies(16, theta, None))
    scaled = np.asarray(rope_frequencies(16, theta, scaling))
    turns = 64 * plain / (2 * np.pi)  # 10.2, 3.2, 1.02, 0.32, ...
    smooth = (turns[1:3] - 1) / 3
    np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(scaled[1:3], plain[1:3] * (smooth + (1 - smooth) / 8), rtol=1e-5)
    np.testing.assert_allclose(scaled[3:], plain[3:] / 8, rtol=1e-6)


@pytest.fixture(scope="module")
def smollm2() -> tuple[DecoderConfig, dict[str, jax.Array]]:
    return load_model(find_embedded("smollm2-135m"))


def test_smollm2_logits_equal_transformers(smollm2) -> None:
    """512 tokens of real text, float32: every position's best token and normaliser, 16 x 1,024 logits, to 1e-3."""
    golden = np.load(GOLDENS / "smollm2" / "expected.npz")
    text = golden["text"][None]
    logits = logits_of(*smollm2, text, np.ones_like(text, bool))[0]
    kept = logits[golden["positions"]][:, :: int(golden["stride"])]
    np.testing.assert_allclose(kept, golden["logits"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(logits.max(-1), golden["top"], rtol=0, atol=1e-3)
    shifted = np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
    np.testing.assert_allclose(logits.max(-1) + np.log(shifted), golden["logsumexp"], rtol=0, atol=1e-3)
    # Where the best token is not transformers', it is within rounding of it.
    chosen = np.take_along_axis(logits, golden["argmax"][:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(chosen, golden["top"], rtol=0, atol=1e-3)


def test_smollm2_greedy_continuations_equal_transformers(smollm2) -> None:
    """Eight prompts, 128 tokens each: given what came before, every next token is the best one.

    One forward over prompt and continuation decides the same as 128 steps would: a step's argmax must be the golden's
    next token as long as all before were.
    """
    golden = np.load(GOLDENS / "smollm2" / "expected.npz")
    prompts, continuations = golden["prompts"], golden["continuations"]
    lengths = (prompts >= 0).sum(-1)
    total = prompts.shape[1] + continuations.shape[1]
    tokens, real = np.zeros((len(prompts), total), np.int32), np.zeros((len(prompts), total), bool)
    for row, (n, prompt, continuation) in enumerate(zip(lengths, prompts, continuations, strict=True)):
        tokens[row, : n + 128] = np.concatenate([prompt[:n], continuation])
        real[row, : n + 128] = True
    logits = logits_of(*smollm2, tokens, real)
    for row, n in enumerate(lengths):
        best = logits[row, n - 1 : n + 127].argmax(-1)
        np.testing.assert_array_equal(best, continuations[row], err_msg=f"prompt {row}")
