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
class DecoderConfig:
    """Every number of a decoder-only transformer, as its checkpoint's own config gives them."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
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
    rope_scaling: RopeScaling | None = None
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
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd: rotary embeddings turn pairs; use an even number")
