"""One table of names: which tensor of a Hugging Face or GGUF checkpoint fills which parameter, and how.

What happens:
1. `_rows` lists each parameter of a config with its name in both formats and its shape in the file; families differ
   only by rows that the config's numbers switch on;
   and an expert's matrices are each a tensor of the file, and rows of one parameter;
2. `hugging_face` and `gguf` turn the rows into a `Table`: a slot a tensor, with what must be undone on the way
   (llama's GGUF interleaves the rows of q and k, Gemma's GGUF stores 1 + w);
3. `check` holds a file against the table before anything is read: every tensor is used exactly once and every
   parameter is filled, or the load fails and names them.

Shapes: V vocabulary, D model, N query heads, K key heads, H head, F MLP, E experts, R rows of a parameter's leading axis.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import numpy as np

from grm_jax.models.config import DecoderConfig

Arrange = Callable[[np.ndarray], np.ndarray]


def as_stored(rows: np.ndarray) -> np.ndarray:
    return rows


def deinterleave(rows_RHx: np.ndarray) -> np.ndarray:
    """Whole heads [R, H, ...] from llama's GGUF order of rotated pairs (i, i + 1) to (i, i + H/2)."""
    heads, size, *rest = rows_RHx.shape
    return rows_RHx.reshape(heads, size // 2, 2, *rest).swapaxes(1, 2).reshape(rows_RHx.shape)


def minus_one(rows: np.ndarray) -> np.ndarray:
    """Norm weights of Gemma's GGUF are stored as 1 + w; ours are w, as in the Hugging Face file."""
    return rows - 1


@dataclass(frozen=True)
class Slot:
    """Where one tensor of a file goes."""

    parameter: str  # path of the parameter
    shape: tuple[int, ...]  # that the tensor must have in the file; reshaped freely to the parameter's
    arrange: Arrange = as_stored  # applied to rows [R, *parameter.shape[1:]], any number R of them
    row: int | None = None  # the tensor is this row of the parameter's leading axis alone: an expert's; None: all of it


@dataclass(frozen=True)
class Table:
    """The tensors that a checkpoint of one config may have."""

    slots: dict[str, Slot]  # by name in the file; each must be there
    copies: dict[str, str] = field(default_factory=dict)  # may be there, if identical to this other tensor
    ignored: frozenset[str] = frozenset()  # may be there, and hold nothing that the config does not
    beyond: str | None = None  # what begins so may be there, and is part of no forward pass


def hugging_face(config: DecoderConfig) -> Table:
    """The tensors of a `...ForCausalLM` or `...ForSequenceClassification` checkpoint as transformers writes it."""
    slots = {row.hf: Slot(row.parameter, row.shape, row=row.expert) for row in _rows(config)}
    # Older transformers saved the rotary frequencies, which are functions of the config.
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.layers)}
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if config.tied and not config.scalar else {}
    # DeepSeek-V3 keeps the modules that predict further tokens, used in pre-training, as layers behind the last one.
    beyond = f"model.layers.{config.layers}." if config.experts and config.experts.sigmoid else None
    return Table(slots, copies, frozenset(buffers | {"model.rotary_emb.inv_freq"}), beyond)


def gguf(config: DecoderConfig, interleaved: bool) -> Table:
    """The tensors of a GGUF file. `interleaved`: rows of q and k are permuted, as the llama architecture's are."""

    def arrange(row: _Row) -> Arrange:
        if interleaved and row.rotated:
            return deinterleave
        return minus_one if config.norm_offset and row.norm else as_stored

    slots = {row.gguf: Slot(row.parameter, row.shape, arrange(row)) for row in _rows(config)}
    return Table(slots, ignored=frozenset({"rope_freqs.weight"}))  # already read into config.rope_scaling


@dataclass(frozen=True)
class _Row:
    parameter: str
    hf: str
    gguf: str
    shape: tuple[int, ...]
    rotated: bool = False  # its heads are turned by the rotary embedding
    norm: bool = False
    expert: int | None = None  # the row of the parameter that the tensor is


def _rows(c: DecoderConfig) -> Iterator[_Row]:
    yield _Row("embed", "model.embed_tokens.weight", "token_embd.weight", (c.vocab_size, c.dim))
    yield _Row("norm", "model.norm.weight", "output_norm.weight", (c.dim,), norm=True)
    if c.scalar:
        yield _Row("score", "score.weight", "", (1, c.dim))
    elif not c.tied:
        yield _Row("head", "lm_head.weight", "output.weight", (c.vocab_size, c.dim))
    for i in range(c.layers):
        for row in (*_attention_rows(c), *_mlp_rows(c, i), *_norm_rows(c)):
            names = f"layers.{i}.{row.parameter}", f"model.layers.{i}.{row.hf}", f"blk.{i}.{row.gguf}"
            yield _Row(*names, row.shape, row.rotated, row.norm, row.expert)


def _attention_rows(c: DecoderConfig) -> Iterator[_Row]:
    if c.latent:
        yield from _latent_rows(c)
        return
    NH, KH, D, H = c.heads * c.head_dim, c.kv_heads * c.head_dim, c.dim, c.head_dim
    yield _Row("attention.q", "self_attn.q_proj.weight", "attn_q.weight", (NH, D), rotated=True)
    yield _Row("attention.k", "self_attn.k_proj.weight", "attn_k.weight", (KH, D), rotated=True)
    yield _Row("attention.v", "self_attn.v_proj.weight", "attn_v.weight", (KH, D))
    yield _Row("attention.o", "self_attn.o_proj.weight", "attn_output.weight", (D, NH))
    if c.qkv_bias:
        yield _Row("attention.q_bias", "self_attn.q_proj.bias", "attn_q.bias", (NH,), rotated=True)
        yield _Row("attention.k_bias", "self_attn.k_proj.bias", "attn_k.bias", (KH,), rotated=True)
        yield _Row("attention.v_bias", "self_attn.v_proj.bias", "attn_v.bias", (KH,))
    if c.qk_norm:
        yield _Row("attention.q_norm", "self_attn.q_norm.weight", "attn_q_norm.weight", (H,), norm=True)
        yield _Row("attention.k_norm", "self_attn.k_norm.weight", "attn_k_norm.weight", (H,), norm=True)


def _latent_rows(c: DecoderConfig) -> Iterator[_Row]:
    """Latent attention; no GGUF file of it is read."""
    NH, D, of = c.heads * c.head_dim, c.dim, c.latent
    if of.q_rank is None:
        yield _Row("attention.q", "self_attn.q_proj.weight", "", (NH, D))
    else:
        yield _Row("attention.q_a", "self_attn.q_a_proj.weight", "", (of.q_rank, D))
        yield _Row("attention.q_a_norm", "self_attn.q_a_layernorm.weight", "", (of.q_rank,), norm=True)
        yield _Row("attention.q_b", "self_attn.q_b_proj.weight", "", (NH, of.q_rank))
    keys_values = c.heads * (c.head_dim - of.rope_dim + of.value_dim)
    yield _Row("attention.kv_a", "self_attn.kv_a_proj_with_mqa.weight", "", (of.kv_rank + of.rope_dim, D))
    yield _Row("attention.kv_a_norm", "self_attn.kv_a_layernorm.weight", "", (of.kv_rank,), norm=True)
    yield _Row("attention.kv_b", "self_attn.kv_b_proj.weight", "", (keys_values, of.kv_rank))
    yield _Row("attention.o", "self_attn.o_proj.weight", "", (D, c.heads * of.value_dim))


def _mlp_rows(c: DecoderConfig, layer: int) -> Iterator[_Row]:
    D, F = c.dim, c.mlp_dim
    if c.mixes(layer):
        yield from _mixture_rows(c)
        return
    yield _Row("mlp.gate", "mlp.gate_proj.weight", "ffn_gate.weight", (F, D))
    yield _Row("mlp.up", "mlp.up_proj.weight", "ffn_up.weight", (F, D))
    yield _Row("mlp.down", "mlp.down_proj.weight", "ffn_down.weight", (D, F))


def _mixture_rows(c: DecoderConfig) -> Iterator[_Row]:
    """A mixture of experts; no GGUF file of one is read."""
    of, D = c.experts, c.dim
    yield _Row("mlp.router", "mlp.gate.weight", "", (of.routed, D))
    if of.bias:
        yield _Row("mlp.router_bias", "mlp.gate.e_score_correction_bias", "", (of.routed,))
    for kind in ("gate", "up", "down"):
        for expert in range(of.routed):
            shape = (D, of.mlp_dim) if kind == "down" else (of.mlp_dim, D)
            name = f"mlp.experts.{expert}.{kind}_proj.weight"
            yield _Row(f"mlp.experts.{kind}", name, "", shape, expert=expert)
        if of.shared_dim:
            shape = (D, of.shared_dim) if kind == "down" else (of.shared_dim, D)
            yield _Row(f"mlp.shared.{kind}", f"mlp.shared_experts.{kind}_proj.weight", "", shape)


def _norm_rows(c: DecoderConfig) -> Iterator[_Row]:
    D = c.dim
    yield _Row("norm_attention", "input_layernorm.weight", "attn_norm.weight", (D,), norm=True)
    if not c.post_norms:
        # The same Hugging Face name is the norm BEFORE the MLP here, and AFTER attention in Gemma-2.
        yield _Row("norm_mlp", "post_attention_layernorm.weight", "ffn_norm.weight", (D,), norm=True)
        return
    after = "post_attention_layernorm.weight", "post_attention_norm.weight"
    yield _Row("norm_attention_post", *after, (D,), norm=True)
    yield _Row("norm_mlp", "pre_feedforward_layernorm.weight", "ffn_norm.weight", (D,), norm=True)
    yield _Row("norm_mlp_post", "post_feedforward_layernorm.weight", "post_ffw_norm.weight", (D,), norm=True)


def check(table: Table, found: Collection[str], parameters: Collection[str], source: str) -> None:
    """Hold a checkpoint's tensor names, and the parameters that are wanted, against the table.

    Raises ValueError naming the tensors that nothing uses, those that are missing, or the parameters left empty.
    """
    unused = sorted(set(found) - table.slots.keys() - table.copies.keys() - table.ignored)
    unused = [name for name in unused if table.beyond is None or not name.startswith(table.beyond)]
    if unused:
        raise ValueError(
            f"{source}: no parameter takes {_some(unused)}; every tensor must be used, so the weights and their "
            "config disagree, or they are of another kind of model (a classifier, an adapter, quantised)"
        )
    missing = sorted(table.slots.keys() - set(found))
    if missing:
        raise ValueError(
            f"{source}: has no {_some(missing)}; every parameter must be filled, so the file is incomplete or its "
            "config describes another model: fetch both again"
        )
    filled = {slot.parameter for slot in table.slots.values()}
    if filled != set(parameters):
        raise ValueError(
            f"{source}: its config has parameters {_some(sorted(filled - set(parameters)))} and lacks "
            f"{_some(sorted(set(parameters) - filled))} of those asked for; build the model from read_config(path)"
        )


def check_shape(slot: Slot, found: tuple[int, ...], wanted: tuple[int, ...], tensor: str, source: str) -> None:
    """Raise ValueError unless the tensor has the slot's shape and as many numbers as the parameter."""
    part = wanted if slot.row is None else wanted[1:]
    if found != slot.shape or np.prod(found) != np.prod(part):
        raise ValueError(
            f"{source}: tensor {tensor} has shape {found}, its config asks for {slot.shape} to fill "
            f"{slot.parameter} {wanted}; weights and config are of different models"
        )


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:5]) or "nothing"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
