"""The numbers that make one decoder a Llama, a Qwen or a Gemma: no modes, no `if family`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the rotary frequencies: long wavelengths are slowed by `factor`, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): pairs that turn often within the original context keep their frequency, slow ones are
    divided by `factor`, those between are blended by their index; cosines and sines are multiplied by a temperature."""

    factor: float
    original_max_positions: int
    attention_factor: float  # of cosines and sines; 0.1 ln(factor) + 1 in the paper, 1 in DeepSeek
    beta_fast: float = 32.0  # turns from which on a frequency is kept
    beta_slow: float = 1.0  # turns up to which it is divided
    whole: bool = True  # the two bounds are rounded outwards to whole pairs


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1): a token's keys and values of all heads are products
    of one small vector, which is all that a cache keeps of them, beside one rotated key that the heads share."""

    kv_rank: int  # numbers of that vector
    rope_dim: int  # rotated numbers of a query and of the shared key; the last ones of a head
    value_dim: int  # of a head
    q_rank: int | None = None  # queries too are products of a vector of so many numbers; None: of the residual stream
    interleaved: bool = True  # rotated pairs are (2i, 2i + 1), not (i, i + rope_dim / 2)
    norm_eps: float = 1e-6  # of the norms on both vectors: a constant of the released code, not of its config


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of the MLP (arXiv 2405.04434, section 2.2; V3: 2412.19437, section 2.1.2)."""

    routed: int
    per_token: int  # how many of them a token goes to
    mlp_dim: int  # of one routed expert
    shared_dim: int = 0  # of the expert that every token goes to; 0: there is none
    dense_layers: int = 0  # the first layers, which keep an MLP of the config's `mlp_dim`
    sigmoid: bool = False  # affinities are sigmoids of the router's logits, not their softmax over the routed experts
    bias: bool = (
        False  # a number an expert is added to its affinity where experts are chosen, not where they are weighed
    )
    groups: int = 1  # experts lie in groups of equal size; a token's experts come from the `groups_kept` best groups
    groups_kept: int = 1
    group_top: int = 1  # a group is as good as the sum of its so many best affinities
    normalised: bool = False  # a token's weights are divided by their sum
    scale: float = 1.0  # multiplies the weights

    def __post_init__(self) -> None:
        if self.routed % self.groups or not 1 <= self.groups_kept <= self.groups:
            raise ValueError(
                f"{self.routed} experts in {self.groups} groups, {self.groups_kept} kept: groups are of equal size, and "
                "from one to all of them are kept; correct these numbers"
            )
        size = self.routed // self.groups
        if not (1 <= self.per_token <= self.groups_kept * size and 1 <= self.group_top <= size):
            raise ValueError(
                f"per_token = {self.per_token}, group_top = {self.group_top}: the groups kept have "
                f"{self.groups_kept} x {size} experts; a token goes to one or more of them, correct these numbers"
            )


@dataclass(frozen=True)
class DecoderConfig:
    """Every number of a decoder-only transformer, as its checkpoint's own config gives them."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int  # with `latent`, as many as heads
    head_dim: int  # of a query; with `latent`, rotated and other numbers together
    mlp_dim: int
    norm_eps: float
    rope_theta: float
    query_scale: float  # multiplies queries; head_dim ** -0.5, but 144 ** -0.5 in Gemma-2 27B
    max_positions: int
    tied: bool  # the output head is the embedding
    windows: tuple[int | None, ...]  # a layer: how many tokens a query sees, itself included; None is all
    activation: str = "silu"  # of the gate: "silu" or "gelu_tanh"
    norm_offset: float = 0.0  # norms multiply by offset + weight; 1 in Gemma
    embed_scale: float = 1.0  # multiplies embeddings; sqrt(dim) in Gemma
    attention_softcap: float | None = None  # logits become cap * tanh(logits / cap)
    logit_softcap: float | None = None
    qkv_bias: bool = False  # Qwen2.5
    qk_norm: bool = False  # Qwen3
    post_norms: bool = False  # Gemma-2: norms after attention and MLP too
    rope_scaling: RopeScaling | Yarn | None = None
    latent: Latent | None = None
    experts: Experts | None = None
    scalar: bool = False  # one number a token, from `score`, in the place of the output head: a meta RM

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads = {self.heads} is no multiple of kv_heads = {self.kv_heads}: each key head serves the same "
                "number of query heads; correct one of the two"
            )
        if len(self.windows) != self.layers:
            raise ValueError(f"windows has {len(self.windows)} entries for layers = {self.layers}: give one a layer")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation = {self.activation!r}: known are 'silu' and 'gelu_tanh'")
        if self.rope_dim % 2:
            raise ValueError(f"head_dim = {self.rope_dim} is odd: rotary embeddings turn pairs; use an even number")
        if self.latent and (self.rope_dim >= self.head_dim or self.kv_heads != self.heads):
            raise ValueError(
                f"latent attention with head_dim = {self.head_dim}, rope_dim = {self.rope_dim}, {self.heads} heads and "
                f"{self.kv_heads} kv_heads: a head has numbers that are not rotated, and there are as many kv_heads"
            )

    @property
    def rope_dim(self) -> int:
        """Rotated numbers of a query."""
        return self.latent.rope_dim if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """Numbers of a head's value."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def stored(self) -> tuple[tuple[int, int], ...]:
        """What a cache keeps of a token in a layer: (heads, numbers of each) of keys and of values.

        With `latent` the keys alone, of one head: values are their first `kv_rank` numbers.
        """
        if self.latent:
            return ((1, self.latent.kv_rank + self.latent.rope_dim),)
        return ((self.kv_heads, self.head_dim),) * 2

    def mixes(self, layer: int) -> bool:
        """Whether a layer has experts in the place of the MLP."""
        return self.experts is not None and layer >= self.experts.dense_layers

    @property
    def repeats(self) -> tuple[int, int]:
        """(First layer, period): from that layer on, layers a period apart are alike but for their weights."""
        first = self.experts.dense_layers if self.experts is not None else 0
        rest = self.layers - first
        for period in range(1, rest):
            if rest % period == 0 and all(
                self.windows[i] == self.windows[i + period] for i in range(first, self.layers - period)
            ):
                return first, period
        return self.layers, 1
