"""Makes the golden logits that the decoder and the loaders are held against, with transformers as the reference.

    python tests/goldens/make_logits.py --out tests/goldens [--gguf SmolLM2-135M-Instruct.Q4_1.gguf] [--only NAME ...]

Needs torch and transformers (made with torch 2.13.0 and transformers 5.23.0), which the product never imports; one to
three minutes, nearly all of it for --gguf. It writes

1. OUT/<family>/{config.json, model.safetensors, expected.npz}: a tiny random model of each family whose every number
   matters (norms and biases random, windows shorter than the text, soft-caps that bite, rotary scaling that kinks
   within the head), and its float32 logits for three rows without padding, left-padded and right-padded;
2. OUT/gemma2_classifier: the same for a classifier of one label, whose only logit a row is that of its last token;
3. OUT/smollm2/expected.npz (with --gguf): the float32 logits of the dequantised SmolLM2-135M over 512 tokens of real
   text, in summary, and its greedy continuations of eight prompts.

Logits at padding are stored as zeros. A greedy continuation is kept only if its closest call between two tokens is
wider than MARGIN, so that two correct float32 implementations cannot differ in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

SEED = 20261122
ROWS, LENGTH = (20, 13, 5), 20  # tokens of each row, and the padded length
WINDOW = 8
CONTINUATION, MARGIN = 128, 1e-2

_TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 3, "dtype": "float32"}
_LATENT = (
    _TINY
    | _EXPERTS
    | {
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,  # so that of four pairs one is kept, one blended, and two are divided
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 4,
            "beta_slow": 1,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
        },
    }
)

# head_dim 16 is not hidden_size / heads = 8, wherever a family lets it be chosen. "dtype" is that of the file.
FAMILIES = {
    "llama": _TINY
    | {
        "head_dim": 16,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            # 64 positions: the eight frequencies of a head are kept (1), interpolated (2) and divided (5).
            "original_max_position_embeddings": 64,
        },
        "dtype": "bfloat16",
    },
    "mistral": _TINY | {"head_dim": 16, "tie_word_embeddings": True, "sliding_window": WINDOW, "dtype": "float16"},
    "qwen2": _TINY
    | {
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "dtype": "float32",
    },
    "qwen3": _TINY
    | {
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "dtype": "float32",
    },
    "gemma2": _TINY
    | {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "query_pre_attn_scalar": 8,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
        "dtype": "bfloat16",
    },
    # V2-Lite's shape: queries from the residual stream, experts chosen among all, YaRN with DeepSeek's two scales.
    "deepseek_v2": _LATENT
    | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "n_shared_experts": 2}
    | {"dtype": "bfloat16"},
    # V2's: queries from a latent, groups chosen by their best expert, weights scaled.
    "deepseek_v2_groups": _LATENT
    | {"q_lora_rank": 24, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
    | {"routed_scaling_factor": 16.0, "n_shared_experts": 1},
    # V3's: sigmoid and bias, groups chosen by their two best experts, weights normalised and scaled.
    "deepseek_v3": _LATENT
    | {"q_lora_rank": 24, "n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    | {"n_shared_experts": 1, "num_mtp_layers": 0, "dtype": "bfloat16"},
    "qwen3_moe": _TINY
    | _EXPERTS
    | {
        "head_dim": 16,
        "tie_word_embeddings": False,
        "num_experts": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}
KINDS = {"deepseek_v2_groups": "deepseek_v2"}  # model types of those that are not named by theirs
CLASSIFIER = "gemma2_classifier"  # Gemma-2 with one label
BIAS = "e_score_correction_bias"  # of V3's router, a buffer
SHARDED = "qwen2"  # written in several files with an index


def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Every parameter random: matrices ~ N(0, 1 / fan_in), norms around their neutral value, biases around zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                parameter.copy_(noise * parameter.shape[2] ** -0.5)
            elif name.endswith("norm.weight"):
                neutral = 0.0 if model.config.model_type == "gemma2" else 1.0
                parameter.copy_(neutral + 0.3 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.5 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(noise * 0.4)
            elif "q_proj" in name or "k_proj" in name:
                parameter.copy_(noise * 2.0 * parameter.shape[1] ** -0.5)  # peaked attention, over the soft-cap too
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith(BIAS):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def padded(side: str) -> np.ndarray:
    """Which of [rows, LENGTH] are real tokens."""
    if side == "none":
        return np.ones((len(ROWS), LENGTH), bool)
    real = np.arange(LENGTH)[None] < np.array(ROWS)[:, None]
    return real if side == "right" else real[:, ::-1]


def logits(model: PreTrainedModel, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Float32 logits; positions count real tokens, as transformers' own generate numbers them."""
    mask = torch.from_numpy(real.astype(np.int64))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(torch.from_numpy(tokens.astype(np.int64)), attention_mask=mask, position_ids=positions).logits
    if out.ndim == 2:  # a classifier's
        return out.float().numpy()
    return np.where(real[..., None], out.float().numpy(), 0.0).astype(np.float32)


def make_family(name: str, folder: Path) -> None:
    kind, loader = KINDS.get(name, name), AutoModelForCausalLM
    if name == CLASSIFIER:
        kind, loader = "gemma2", AutoModelForSequenceClassification
    numbers = FAMILIES["gemma2"] | {"num_labels": 1} if name == CLASSIFIER else dict(FAMILIES[name])
    dtype = getattr(torch, numbers.pop("dtype"))
    generator = torch.Generator().manual_seed(SEED)
    config = AutoConfig.for_model(kind, **numbers)
    model = loader.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    randomise(model, generator)
    folder.mkdir(parents=True, exist_ok=True)
    biases = {name: bias.clone() for name, bias in model.named_buffers() if name.endswith(BIAS)}
    model.to(dtype)
    for path, bias in biases.items():  # float32 in files of any type
        setattr(model.get_submodule(path.removesuffix(f".{BIAS}")), BIAS, bias)
    model.save_pretrained(folder, max_shard_size="40KB" if name == SHARDED else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone
    # What the file holds, computed with in float32.
    model = loader.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    rng = np.random.default_rng(SEED)
    expected = {}
    for side in ("none", "left", "right"):
        real = padded(side)
        tokens = np.where(real, rng.integers(3, numbers["vocab_size"], real.shape), 0).astype(np.int32)
        expected |= {f"{side}_tokens": tokens, f"{side}_real": real, f"{side}_logits": logits(model, tokens, real)}
    np.savez_compressed(folder / "expected.npz", **expected)
    spread = expected["none_logits"].std()
    print(f"{name}: logits std {spread:.2f}, files {sorted((f.name, f.stat().st_size) for f in folder.iterdir())}")


# The Gettysburg Address, the opening of the Declaration of Independence, a program, three languages.
TEXT = """Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in
Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great
civil war, testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are
met on a great battle-field of that war. We have come to dedicate a portion of that field, as a final
resting place for those who here gave their lives that that nation might live. It is altogether fitting and
proper that we should do this. But, in a larger sense, we can not dedicate -- we can not consecrate -- we
can not hallow -- this ground. The brave men, living and dead, who struggled here, have consecrated it, far
above our poor power to add or detract. The world will little note, nor long remember what we say here, but
it can never forget what they did here. It is for us the living, rather, to be dedicated here to the
unfinished work which they who fought here have thus far so nobly advanced. It is rather for us to be here
dedicated to the great task remaining before us -- that from these honored dead we take increased devotion
to that cause for which they gave the last full measure of devotion -- that we here highly resolve that
these dead shall not have died in vain -- that this nation, under God, shall have a new birth of freedom --
and that government of the people, by the people, for the people, shall not perish from the earth.

When in the Course of human events, it becomes necessary for one people to dissolve the political bands
which have connected them with another, and to assume among the powers of the earth, the separate and equal
station to which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of
mankind requires that they should declare the causes which impel them to the separation. We hold these
truths to be self-evident, that all men are created equal, that they are endowed by their Creator with
certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness.

def fibonacci(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a

Guten Morgen, wie geht es dir? Ça va très bien, merci. ¿Dónde está la biblioteca?
"""

PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper.",
    "Explain why the sky is blue.",
    "List five uses of a paper clip.",
    "Write a Python function that reverses a list.",
    "Who wrote the play Hamlet, and when?",
    "How do I make a cup of tea?",
    "What is 17 + 25? Show your steps.",
    "Give me three tips for better sleep.",
    "Describe the water cycle to a child.",
    "Translate 'good morning' into Spanish and French.",
    "What are the planets of the solar system?",
    "Summarise the story of Cinderella.",
    "Why do leaves change colour in autumn?",
    "Write a polite email asking for a day off.",
    "What is the difference between a frog and a toad?",
)


def tokenizer(gguf_file: Path):
    """The file's own byte-level BPE; transformers' conversion of it drops the pre-tokenizer."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(gguf_file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    built = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    built.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return built


def continuations(model: PreTrainedModel, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens [rows, CONTINUATION] (an end of turn does not stop a row) and each row's closest call."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    cache, tokens, margins = None, [], []
    for _ in range(CONTINUATION):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            step = model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cache = step.past_key_values
        best = step.logits[:, -1].topk(2)
        margins.append((best.values[:, 0] - best.values[:, 1]).numpy())
        ids = best.indices[:, :1]
        tokens.append(ids[:, 0].numpy())
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return np.stack(tokens, 1), np.stack(margins).min(0)


def make_smollm2(gguf_file: Path, folder: Path) -> None:
    built = tokenizer(gguf_file)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    text = built.encode(TEXT).ids[:512]
    assert len(text) == 512, f"the text has {len(text)} tokens, it must have 512 or more"
    with torch.no_grad():
        out = model(torch.tensor([text])).logits[0].float()
    positions, stride = np.linspace(0, 511, 16).astype(np.int32), 48
    prompts = [built.encode(f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n").ids for p in PROMPTS]
    tokens, margins = continuations(model, prompts)
    for prompt, row, margin in zip(PROMPTS, tokens, margins, strict=True):
        print(f"margin {margin:.5f} {prompt!r} -> {built.decode(row.tolist())[:60]!r}")
    kept = [(prompts[i], tokens[i]) for i in np.flatnonzero(margins > MARGIN)[:8]]
    assert len(kept) == 8, f"only {len(kept)} prompts keep a margin of {MARGIN}; add prompts"
    length = max(len(ids) for ids, _ in kept)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / "expected.npz",
        text=np.array(text, np.int32),
        positions=positions,
        stride=np.int32(stride),
        logits=out[positions][:, ::stride].numpy(),
        top=out.max(-1).values.numpy(),
        argmax=out.argmax(-1).numpy().astype(np.int32),
        logsumexp=out.logsumexp(-1).numpy(),
        prompts=np.array([ids + [-1] * (length - len(ids)) for ids, _ in kept], np.int32),  # -1 after the end
        continuations=np.array([row for _, row in kept], np.int32),
    )
    print(f"smollm2: logits std {out.std():.2f}, {(folder / 'expected.npz').stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--only", nargs="*", default=[*FAMILIES, CLASSIFIER])
    args = parser.parse_args()
    for name in args.only:
        make_family(name, args.out / name)
    if args.gguf:
        make_smollm2(args.gguf, args.out / "smollm2")


if __name__ == "__main__":
    main()
