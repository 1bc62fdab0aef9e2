"""The embedded model's weights in the two forms that the peers read, dequantised from the product's own GGUF file.

1. `write_gguf`: a GGUF file with BF16 matrices and F32 norms and the original's metadata, for llama.cpp.
2. `write_folder`: a Hugging Face folder in float32 (config.json, model.safetensors), for transformers and Tunix.

llama.cpp's converter interleaves the rows of q and k for its rotary layout; the folder has them back in halves.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(source: Path, target: Path) -> None:
    """The model of `source` with BF16 matrices; its norms stay F32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue  # the writer writes these itself
        if field.name == "general.file_type":
            writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    bf16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if weights.ndim == 1:
            writer.add_tensor(tensor.name, weights)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(weights, bf16), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_folder(source: Path, target: Path) -> None:
    """The Llama model of `source` as a Hugging Face folder in float32, its head tied to its embedding."""
    reader = gguf.GGUFReader(source)

    def number(name: str) -> float:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = number("attention.head_count"), number("attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        *layer, part, _ = tensor.name.split(".")
        if part in ("attn_q", "attn_k"):
            weights = _halves(weights, heads if part == "attn_q" else kv_heads)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        tensors[f"{prefix}{_NAMES[part]}.weight"] = np.ascontiguousarray(weights)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base"),
        "max_position_embeddings": number("context_length"),
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from interleaved pairs to two halves."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
