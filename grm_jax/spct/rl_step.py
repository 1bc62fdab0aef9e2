"""One step of rule-based RL (section 3.2) as ONE compiled program: rollouts, scores, rewards, gradients, update.

1. `roll`: the policy's working copy, laid out for decoding, prefills the shared head once and each prompt once, then
   decodes G samples of each with the sampler's own loop (`sampler.rollout`); their log-probabilities are carried, one
   number a token.
2. The scores are read from the tokens on the device (`scores.read`), and rewarded: +1 right, -1 wrong, unparsable or
   unfinished (Eq. 10, Eq. 11); rewards become advantages within each prompt's group.
3. Gradients are added up over microbatches of whole prompts. Token weights are made once from the whole batch, so any
   size of microbatch gives the same gradient. The KL's reference is `frozen`, run without a gradient.
4. AdamW moves the parameters. `updates_per_step` > 1 repeats 3 and 4 on the same rollouts.

Departures from the paper, which gives no such detail: old log-probabilities are the sampler's own, also for the first
update, so a difference between sampler and trainer is weighed like any other policy lag; `drift` logs that difference.
A rollout that ran into its budget is wrong even where a box stands in it: else nothing teaches a judge to stop.

Shapes: P prompts, G rollouts a prompt, R = P * G, S prompt slots, T tokens, N responses, M microbatches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from grm_jax import losses, rewards, scores
from grm_jax.data.batches import Batch
from grm_jax.models.attention import Keys
from grm_jax.models.decoder import Params, bind
from grm_jax.recipes import RlConfig
from grm_jax.sampler import Sampling, rollout
from grm_jax.sharding import place, replicated, spread
from grm_jax.train.forward import REMATS, load_metrics, of_samples_with_loads
from grm_jax.train.policy import Policy, State, compiled, join, moved, split

Step = Callable[[State, Params, Batch, Key[Array, ""]], tuple[State, "Report"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What a step sampled: tokens [R, T], their log-probabilities [R, T], how many [R], whether an end id came [R]."""

    tokens: Int[Array, "R T"]
    log_probs: Float[Array, "R T"]
    counts: Int[Array, "R"]
    ended: Bool[Array, "R"]

    @property
    def mask(self) -> Bool[Array, "R T"]:
        """The tokens that were drawn, the end id included."""
        return jnp.arange(self.tokens.shape[1])[None] < self.counts[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Judged:
    """Rollouts read and rewarded; an example's columns are in the order shown."""

    scores: Int[Array, "R N"]
    valid: Bool[Array, "R"]
    correct: Bool[Array, "R"]
    tie: Bool[Array, "R"]
    reward: Float[Array, "R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What the host takes back: scalars by name, and the rollouts with their scores and rewards."""

    scalars: dict[str, Float[Array, ""]]
    rollouts: Rollouts
    judged: Judged


def roll(
    policy: Policy,
    weights: Params,
    batch: Batch,
    key: Key[Array, ""],
    recipe: RlConfig,
    sampling: Sampling,
    reading: Params | None = None,
) -> Rollouts:
    """G samples of each prompt: sample g of an item is a function of (key, item, g), not of the batch or the devices.

    reading: the weights that prompts go through, by default those that sample.
    """
    reading = weights if reading is None else reading
    prompts, group, budget = batch.tokens.shape[0], recipe.group, recipe.max_new_tokens
    parts: tuple[Keys, ...] = ()
    if size := batch.head.shape[0]:
        keys = rollout.prefill(policy.graph, reading, None, batch.head[None], jnp.array([size]))
        parts = (Keys(tuple(k[0] for k in keys.k), tuple(v[0] for v in keys.v), keys.positions[0]),)
    head = parts[0] if parts else None
    micro = prompts // recipe.microbatch_prompts
    with jax.named_scope("prefill"):
        stored = jax.lax.map(
            lambda part: rollout.prefill(policy.graph, reading, head, *part),
            (split(batch.tokens, micro), split(batch.lengths - 1, micro)),
        )
    parts += (jax.tree.map(join, stored),)
    count = prompts * group
    rows = rollout.Rows(
        token=jnp.repeat(jnp.take_along_axis(batch.tokens, batch.lengths[:, None] - 1, axis=1)[:, 0], group),
        position=jnp.repeat(size + batch.lengths - 1, group),
        fresh=jnp.ones(count, bool),
        drawn=jnp.zeros(count, jnp.int32),
        budget=jnp.full(count, budget, jnp.int32),
        live=jnp.ones(count, bool),
        queue=jnp.zeros((count, 1), jnp.int32),
        queued=jnp.zeros(count, jnp.int32),
        mask=jnp.full(count, scores.FREE, jnp.int32),
        item=jnp.repeat(batch.items, group),
        sample=jnp.tile(jnp.arange(group, dtype=jnp.int32), prompts),
    )
    ring = rollout.Ring(rollout.empty(policy.config, policy.mesh, policy.dtype, (count,), budget), jnp.int32(0))
    shape = jnp.zeros((prompts, group), bool)
    with jax.named_scope("decode"):
        _, _, written = rollout.decode(
            policy.graph, weights, parts, ring, rows, key, sampling, None, shape, budget
        )  # fmt: skip
    tokens, log_probs = written.tokens.T, written.log_probs.T
    last = jnp.take_along_axis(tokens, written.count[:, None] - 1, axis=1)[:, 0]
    ended = (last[:, None] == jnp.array(sampling.eos_ids)[None]).any(axis=1)
    return Rollouts(tokens, log_probs, written.count, ended)


def judge(rollouts: Rollouts, batch: Batch, group: int, table: scores.TokenTable, reward: rewards.Reward) -> Judged:
    """Scores read from the tokens and rewarded. A rollout that ran into the budget is not valid, whatever it says."""
    labels, counts, low, high, choice = (
        jnp.repeat(x, group, axis=0) for x in (batch.labels, batch.counts, batch.low, batch.high, batch.choice)
    )
    wide, numbers = scores.LIMIT, jnp.where(choice, 1, counts)
    raw, parsed = scores.read(table, rollouts.tokens, rollouts.counts, numbers, labels.shape[1], -wide, wide)
    of_choice, chosen = scores.chosen(raw, parsed, counts)
    valid = jnp.where(choice, chosen, parsed) & rollouts.ended
    read = jnp.where(choice[:, None], of_choice, jnp.clip(raw, low[:, None], high[:, None]))
    found = jnp.where(valid[:, None], read, -1)
    found = jnp.where(jnp.arange(labels.shape[1])[None] < counts[:, None], found, -1)
    return Judged(
        scores=found,
        valid=valid,
        correct=rewards.correct(found, valid, labels, counts),
        tie=rewards.tied(found, valid, labels, counts),
        reward=reward(found, valid, labels, counts),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Share:
    """A microbatch: whole prompts with their rollouts, and what the loss needs of them."""

    prompts: Int[Array, "P S"]
    lengths: Int[Array, "P"]
    tokens: Int[Array, "R T"]
    counts: Int[Array, "R"]
    old: Float[Array, "R T"]
    advantages: Float[Array, "R"]
    weights: Float[Array, "R T"]  # of each token in the loss, from the whole batch


def _shares(rollouts: Rollouts, batch: Batch, advantages: Array, weights: Array, recipe: RlConfig) -> _Share:
    """The batch as microbatches: every array with [M] in front."""
    parts, group = batch.tokens.shape[0] // recipe.microbatch_prompts, recipe.group
    return _Share(
        split(batch.tokens, parts),
        split(batch.lengths, parts),
        *(split(x, parts, group) for x in (rollouts.tokens, rollouts.counts, rollouts.log_probs, advantages, weights)),
    )


@dataclasses.dataclass(frozen=True)
class _Update:
    """The loss of an update and its gradients, for one policy and recipe."""

    policy: Policy
    recipe: RlConfig

    def log_probs(self, weights: Params, head: Array, share: _Share) -> tuple[Array, Array, Array | None]:
        """Log-probability and entropy of each rollout token [R, T] under these weights; their experts' loads [L, E]."""
        return of_samples_with_loads(
            *(bind(self.policy.graph, weights), head, share.prompts, share.lengths, share.tokens, share.counts),
            *(self.recipe.temperature, REMATS[self.recipe.remat]),
        )

    def loss(
        self, params: Params, frozen: Params, head: Array, share: _Share, reference: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        """A microbatch's part of the loss (GRPO: arXiv 2402.03300, Eq. 3), and of the metrics: sums over tokens."""
        recipe = self.recipe
        new, entropy, loads = self.log_probs(self.policy.working(params, frozen), head, share)
        mask = jnp.arange(share.tokens.shape[1])[None] < share.counts[:, None]
        of_token, clipped = losses.OBJECTIVES[recipe.objective].surrogate(
            new, share.old, share.advantages, mask, recipe.clip_low, recipe.clip_high
        )
        # At padding both are arbitrary, and the exponential of their difference might not be finite.
        kl = jnp.zeros_like(new) if reference is None else losses.k3(new, jnp.where(mask, reference, new))
        total = jnp.sum(jnp.where(mask, share.weights * (of_token + recipe.kl_coef * kl), 0.0))
        drift = jnp.abs(new - share.old)
        sums = {"kl": kl, "entropy": entropy, "clip_fraction": clipped, "drift": drift}
        sums = {name: jnp.sum(jnp.where(mask, value, 0.0)) for name, value in sums.items()}
        sums |= {} if loads is None else {"loads": loads}
        return total, sums | {"loss": total, "drift_max": jnp.max(jnp.where(mask, drift, 0.0))}

    def gradients(
        self, params: Params, frozen: Params, head: Array, shares: _Share, reference: Array | None
    ) -> tuple[Params, dict[str, Array]]:
        """Gradients and sums over all microbatches, in float32."""

        def add(carry: tuple[Params, dict[str, Array]], given: tuple[_Share, Array | None]) -> tuple[tuple, None]:
            grads, sums = carry
            more, parts = jax.grad(self.loss, has_aux=True)(params, frozen, head, *given)
            largest = jnp.maximum(sums["drift_max"], parts["drift_max"])
            sums = {name: sums[name] + part for name, part in parts.items()} | {"drift_max": largest}
            return (jax.tree.map(jnp.add, grads, more), sums), None

        names = ("kl", "entropy", "clip_fraction", "drift", "loss", "drift_max")
        none = {name: jnp.float32(0) for name in names}
        if experts := self.policy.config.experts:
            none["loads"] = jnp.zeros((self.policy.config.layers - experts.dense_layers, experts.routed))
        zeros = jax.tree.map(jnp.zeros_like, params), none
        return jax.lax.scan(add, zeros, (shares, reference))[0]


def make_step(
    policy: Policy,
    recipe: RlConfig,
    optimizer: optax.GradientTransformation,
    table: scores.TokenTable,
    eos_ids: tuple[int, ...],
    state: State,
    reward: rewards.Reward = rewards.outcome,
) -> Step:
    """The compiled step: (state, frozen, batch, the run's key) -> (state, report). The state is donated.

    It compiles once for each shape of a batch. `state`: the first one, for where its arrays lie. `reward` takes
    (scores [R, N], valid [R], labels [R, N], counts [R]) and gives [R].
    """
    sampling, update = Sampling(recipe.temperature, eos_ids=eos_ids), _Update(policy, recipe)
    objective = losses.OBJECTIVES[recipe.objective]

    def step(state: State, frozen: Params, batch: Batch, key: Key[Array, ""]) -> tuple[State, Report]:
        key = jax.random.fold_in(key, state.step)
        # A loop over layers would stack the copy that samples, which lies whole along `fsdp`, once more. The working copy
        # is gathered a layer at a time instead.
        reading = policy.working(state.params, frozen) if policy.scans else None
        rollouts = roll(policy, policy.decoding(state.params, frozen), batch, key, recipe, sampling, reading)
        judged = judge(rollouts, batch, recipe.group, table, reward)
        advantages = objective.advantage(judged.reward.reshape(-1, recipe.group))
        mask = losses.without_overlong(rollouts.mask, rollouts.ended) if objective.overlong else rollouts.mask
        weights = objective.weights(mask, recipe.max_new_tokens)
        shares, reference = _shares(rollouts, batch, advantages.reshape(-1), weights, recipe), None
        if recipe.kl_coef:
            with jax.named_scope("reference"):
                reference = jax.lax.map(lambda share: update.log_probs(frozen, batch.head, share)[0], shares)
        sums = []
        for _ in range(recipe.updates_per_step):
            with jax.named_scope("gradient"):
                grads, found = update.gradients(state.params, frozen, batch.head, shares, reference)
            params, after, norm = moved(state, grads, optimizer)
            state = State(params, after, state.step)
            sums.append(found)
        tokens = jnp.maximum(rollouts.counts.sum(), 1)
        scalars = {name: sums[-1][name] / tokens for name in ("kl", "entropy", "clip_fraction")} | {
            "loss": sums[-1]["loss"],
            "grad_norm": norm,
            "drift_mean": sums[0]["drift"] / tokens,  # before anything has moved
            "drift_max": sums[0]["drift_max"],
            "zero_advantage_groups": jnp.mean(jnp.all(advantages == 0, axis=1)),
        }
        scalars |= load_metrics(sums[-1]["loads"]) if "loads" in sums[-1] else {}
        return dataclasses.replace(state, step=state.step + 1), Report(scalars, rollouts, judged)

    return compiled(step, state, policy.mesh)


def put(batch: Batch, policy: Policy) -> Batch:
    """A batch of host arrays on the mesh: rows spread over it, the shared head everywhere."""
    rows = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch) if field.name != "head"}
    return Batch(place(batch.head, replicated(policy.mesh)), **spread(rows, policy.mesh))
