"""Token ids by llama.cpp for texts that are hard to cut into tokens: writes tokens.json.

1. The file's own model is loaded into llama.cpp's server (package xllamacpp, no dependency of this project), and
   each text is sent to its /tokenize, with and without reading special strings as control tokens.
2. For each other pre-tokenizer a one-layer model with zero weights, the same vocabulary and that pre-tokenizer's name is
   written to a temporary file and asked the same.

    python tests/goldens/make_tokens.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out tests/goldens/tokens.json

takes a minute.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
import xllamacpp
from gguf import GGUFReader, GGUFWriter

OTHERS = ("default", "gpt-2", "llama-bpe", "qwen2")
# First and last of the digits that Unicode got after version 15, llama.cpp's.
NEW_DIGITS = (
    "\U00010d40\U00010d49\U000116d0\U000116e3\U00011bf0\U00011bf9\U00011de0\U00011de9\U00016130\U00016139"
    "\U00016d70\U00016d79\U00016ff4\U00016ff6\U0001ccf0\U0001ccf9\U0001e5f1\U0001e5fa"
)
TEXTS = (
    *("", " ", "  ", "\n", "\n\n\n", "\t", "\r\n", "\0", "a\0b"),
    *("\x01\x02\x03\x04\x05\x06\x07\x08", "\x1b[31mred\x1b[0m\x7f"),
    "".join(map(chr, range(128))),
    "x\x04y\x14\x16z \x06 the\x1dre 1\x132",
    *("Hello, world!", "  leading and trailing  ", "a  b   c    d     e"),
    "tabs\t\there\n\n  \n then  \r\n\r\nlines \t \n",
    *("I'm you're he'll they've we'd it's don't", "I'M YOU'RE HE'LL it'S 'tis '' ' s"),
    "O’Neill’s ‘quoted’ “words”… — –",
    *("0", "10", "1234567890", "3.14159 2,000,000 1e-9 0x1F 50% $19.99"),
    *("Scores: \\boxed{10, 7, 3}", "v1.2.3-rc4 x86_64 C++20"),
    *("١٢٣ १२३ ½²⅓ Ⅷ① 〇一二", "𝟎𝟏 1\U00010d401 \U000116d0 2 \U0001ccf0"),
    "".join(f"1  {digit}" for digit in NEW_DIGITS),
    "def f(x: int) -> str:\n    return f\"{x!r:>{10}}\"  # comment\n\n\nclass A(B):\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] <<= 1; if (!a[i] && b->c != NULL) goto end; }",
    "<html lang=\"en\"><!-- c --><a href='https://x.org/?q=1&r=%20'>y</a></html>",
    "SELECT * FROM t WHERE a <> 'b' -- c\n;{\"k\": [1, null, true, \"\\u00e9\\n\"]}",
    "\\frac{\\partial f}{\\partial x} = \\sum_{i=1}^{n} x_i^2 \\quad ∀x∈ℝ: x²≥0 ⇒ ∫√∞",
    "| a | b |\n|---|:-:|\n| 1 | **2** |\n\n- [ ] _x_ ~~y~~ `z`\n> quote\n# Title #",
    "https://example.com/path_to/file.tar.gz?x=1#frag user@mail.example",
    "Die Straße führt über Äcker; ẞ GROß naïve façade œuvre ñandú",
    "¿Qué tal? ¡Mañana! «garçon» İstanbul ışık zażółć gęślą jaźń říčný",
    "Tiếng Việt: Quốc ngữ được viết thế này",
    "Русский текст, українська ґ; српски ђ",
    "Ελληνικά ἀρχή σς Ω",
    "שלום עולם, שָׁלוֹם",
    "مرحبا بالعالم مُحَمَّد فارسی\u200cها اردو",
    "नमस्ते दुनिया क्षत्रिय",
    "বাংলা தமிழ் తెలుగు ನಮಸ್ಕಾರ മലയാളം",
    "ภาษาไทยไม่มีช่องว่าง ພາສາລາວ ភាសាខ្មែរ",
    "你好，世界！这是一个测试。繁體字「引號」\u3000全角空白",
    "こんにちは世界、テストです。ｶﾅ ー々゛",
    "안녕하세요 세계 한글",
    "ქართული Հայերեն አማርኛ ᏣᎳᎩ ᐃᓄᒃ ᚠᚢᚦ Ⰰⰰ",
    "𐌰𐌱 𝓐𝓑 𠀀𪛖 𓀀𒀀 🄰",
    "😀 👍🏽 👩\u200d💻 👨\u200d👩\u200d👧\u200d👦 ❤\ufe0f 🇩🇪 1\ufe0f\u20e3 🏴\U000e0067\U000e0062\U000e007f",
    "go😀go 😀😀😀!🎉🎊",
    "e\u0301 é a\u0308\u0304 Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334\u0319\u0324 n\u0303",
    "a\u00a0b\u2003c\u2009d\u202fe\u205ff\u3000g\u1680h\u2028i\u2029j\u0085k\u000bl\u000cm",
    "zero\u200bwidth\u200c\u200d\u2060\ufeffjoiners \u200e\u200f\u202a\u202e bidi \u00ad",
    "\x80\x81\x9f \ufffd\ufffe\uffff \ue000\U000f0000\U0010ffff",
    "←↑→ █░ ┌─┐ ★☆ ♠ ♫ €£¥₿ ™®© §¶",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_start|> <|im_end|>x<|endoftext|>",
    "<|im_start|", "<|im_start|>>", "<<|im_end|>", "<|IM_END|> <| im_end |> <im_end>",
    "<repo_name>a/b<file_sep>c.py\n<reponame><issue_start><jupyter_code>1<empty_output>",
    "<0x0A><s></s><unk>[INST]<start_of_turn>▁▁ ĠĊ",
    "[The Begin of Response 1]\nText.\n[The End of Response 1]\n\n#### Output Format Requirements ####\n",
    "a" * 100, "ab" * 60, "the " * 30, "\n" * 50, " " * 70 + "x", "=" * 77, "9" * 33, "." * 40 + " " + "!?" * 20,
    "Supercalifragilisticexpialidocious antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "CamelCaseIdentifier snake_case_name SCREAMING_SNAKE kebab-case-word mixedUPlow123abc",
    "donʼt 'S's'T't \u017f'\u017f K\u212a ﬁﬂ ǆǅ",
    "The quick brown fox jumps over the lazy dog. " * 4,
)  # fmt: skip


def random_texts(seed: int, count: int) -> list[str]:
    """Texts of ASCII, of all of Unicode (no surrogates), and of both with white space."""
    rng = random.Random(seed)
    points = [*range(0xD800), *range(0xE000, 0x110000)]

    def text() -> str:
        share = rng.choice((0.0, 0.1, 1.0))
        ascii_ = [chr(rng.randrange(128)) for _ in range(60)] + [" ", "\n", "1", "'", "the", "ing", "<|im_end|>"]
        return "".join(chr(rng.choice(points)) if rng.random() < share else rng.choice(ascii_) for _ in range(40))

    return [text() for _ in range(count)]


class Server:
    """llama.cpp's server on one file."""

    def __init__(self, path: Path):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.port, params.warmup = str(path), 64, 0, False
        self._server = xllamacpp.Server(params)

    def ids(self, text: str, special: bool) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": special}).encode()
        request = urllib.request.Request(
            self._server.listening_address + "/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)["tokens"]


def write_tiny(path: Path, reader: GGUFReader, pre: str) -> None:
    """A one-layer Llama of zeros with the reader's vocabulary and another pre-tokenizer."""
    tokens, types, merges = (
        reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "token_type", "merges")
    )
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    square = np.zeros((32, 32), np.float32)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", square[0])
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="a GGUF file of model 'gpt2'")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    texts = [*TEXTS, *random_texts(seed=0, count=30)]
    server, reader = Server(arguments.gguf), GGUFReader(arguments.gguf)
    golden = {
        "texts": texts,
        "ids": [server.ids(text, special=True) for text in texts],
        "plain": [server.ids(text, special=False) for text in texts],
        "others": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for pre in OTHERS:
            path = Path(folder) / f"{pre}.gguf"
            write_tiny(path, reader, pre)
            server = Server(path)
            golden["others"][pre] = [server.ids(text, special=True) for text in texts]
    arguments.out.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
