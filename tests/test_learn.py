"""It learns: on prompts of eight bytes, in a minute or two, what launch/learn.sh shows on whole judgments.

A query asks for the higher or the lower of two numbers: the query AND the responses are needed. A small model is
fine-tuned on a poor judge's scores, then trained by the compiled step on the correctness of its own. This file is also the
program that does so, in a process under XLA's own flags: those of the other tests make its many steps twice as slow.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from tiny import LLAMA, tiny_model

from grm_jax import scores
from grm_jax.data.batches import Batch
from grm_jax.data.packing import Source, packed
from grm_jax.recipes import Items, Lora, Optimizer, RftConfig, RlConfig
from grm_jax.sharding import replicated
from grm_jax.spct import rft_step, rl_step
from grm_jax.tokenizer import ByteTokenizer
from grm_jax.train.policy import Policy, make_optimizer, start

TOKENIZER = ByteTokenizer()
CONFIG = dataclasses.replace(LLAMA, dim=64, mlp_dim=128, layers=2, windows=(None, None), head_dim=16)
PAIRS = [(a, b) for a in range(10) for b in range(10) if a != b]
ITEMS = [(query, name, *pair) for query in "hl" for name in "abcdefghijklmnop" for pair in PAIRS]
random.Random(0).shuffle(ITEMS)
HELD_OUT, TRAIN = ITEMS[:40], ITEMS[40:]


def prompt(item):
    query, name, a, b = item
    return list(f"{query}{name}: {a} {b}\n".encode())


def right(item):
    query, _, a, b = item
    return [1 + x if query == "h" else 10 - x for x in (a, b)]


def fine_tuned(steps):
    """A model that writes boxes whose scores are the right ones and noise."""
    rng = random.Random(1)

    def encode(item):
        noisy = [min(max(round(score + rng.gauss(0, 1.5)), 1), 10) for score in right(item)]
        return prompt(item), [*f"\\boxed{{{noisy[0]}, {noisy[1]}}}".encode(), *TOKENIZER.eos_ids]

    recipe = RftConfig(
        general=("given",),
        batch_tokens=8 * 128,
        sequence_tokens=128,
        microbatch_rows=8,
        steps=steps,
        optimizer=Optimizer(learning_rate=5e-3, warmup_steps=10, schedule="cosine"),
        remat="none",
    )
    model = tiny_model(CONFIG)
    policy = Policy(model.config, model.graph, model.mesh, Lora(), jnp.dtype("float32"))
    optimizer = make_optimizer(recipe.optimizer, steps)
    state = start(jax.device_put(model.params, replicated(model.mesh)), optimizer, model.mesh)
    step = rft_step.make_step(policy, recipe, optimizer, state)
    rows = iter(packed([Source(TRAIN, encode, 1.0)], 8, 128, 0)[0])
    for _ in range(steps):
        state, _ = step(state, {}, rft_step.put(next(rows), policy))
    return policy, state.params


def batch_of(items):
    tokens = np.zeros((len(items), 16), np.int32)
    for row, item in zip(tokens, items, strict=True):
        row[: len(prompt(item))] = prompt(item)
    labels = [[float(s == max(right(item))) for s in right(item)] for item in items]
    return Batch(
        head=np.zeros(0, np.int32),
        tokens=tokens,
        lengths=np.array([len(prompt(item)) for item in items], np.int32),
        labels=np.array(labels, np.float32),
        counts=np.full(len(items), 2, np.int32),
        low=np.full(len(items), 1, np.int32),
        high=np.full(len(items), 10, np.int32),
        choice=np.zeros(len(items), bool),
        items=np.arange(len(items), dtype=np.int32),
    )


def learned(fine_tuning: int, steps: int) -> dict[str, float]:
    """Accuracy before and after so many steps of RL behind so many of fine-tuning, and the share of valid judgments."""
    policy, params = fine_tuned(fine_tuning)
    recipe = RlConfig(
        prompts_per_step=40,
        group=8,
        microbatch_prompts=40,
        max_new_tokens=18,
        kl_coef=0.0,
        items=Items(files=("given",)),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=5, schedule="cosine"),
        remat="none",
    )
    key = jax.random.key(0, impl="threefry2x32")
    optimizer = make_optimizer(recipe.optimizer, steps)
    state = start(params, optimizer, policy.mesh)
    table = scores.token_table(TOKENIZER.token_bytes())
    step = rl_step.make_step(policy, recipe, optimizer, table, TOKENIZER.eos_ids, state)
    still = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, learning_rate=0.0))
    measure = rl_step.make_step(policy, still, make_optimizer(still.optimizer, 1), table, TOKENIZER.eos_ids, state)

    def accuracy(params):
        """Of sampled judgments of the prompts that are never trained on, at temperature 1."""
        begun = start(jax.tree.map(jnp.copy, params), make_optimizer(still.optimizer, 1), policy.mesh)
        judged = measure(begun, {}, rl_step.put(batch_of(HELD_OUT), policy), key)[1].judged
        return float(judged.correct.mean()), float(judged.valid.mean())

    before, _ = accuracy(state.params)
    rng = random.Random(2)
    for _ in range(steps):
        state, _ = step(state, {}, rl_step.put(batch_of(rng.sample(TRAIN, 40)), policy), key)
    after, valid = accuracy(state.params)
    return {"before": before, "after": after, "valid": valid}


def test_reinforcement_learning_makes_a_poor_judge_a_good_one():
    own = {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, __file__, "250", "120"],
        capture_output=True, text=True, env=os.environ | own, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["before"] < 0.75, found
    assert found["after"] > 0.80, found
    assert found["valid"] > 0.95, found


if __name__ == "__main__":
    print(json.dumps(learned(*map(int, sys.argv[1:]))))
