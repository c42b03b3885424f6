"""A small random Llama, made on the spot, so that the demo and the tests need no download.

Its text means nothing; its arithmetic is a real model's. Two things are arranged:

- Weights have more spread than an initialised model's, so that logits are far apart and depend on the whole context: a wrong
  block of KV changes the tokens.
- Every token is one character, and every character of the vocabulary is one token, so encode(decode(ids)) = ids for
  whatever the model generates, and a chat's next prompt begins with exactly the tokens of the turn before.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from blake3 import blake3
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from cachebus.errors import HeadstartError

NAME = "headstart-demo"
SEED = 20_26
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 512, 8, 8, 2, 64, 1408
CONTEXT_TOKENS = 32_768
ANSWER_TOKENS = 256
"""Length of an answer whose client names none: nothing this model says ends it, so it would fill the whole context"""
VOCABULARY = 4096
UNKNOWN, TURN_START, TURN_END = "\u25a1", "\ue000", "\ue001"
"""Stand-ins of one character each; none is a special token, since special tokens vanish when text is made of ids."""

_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '" + TURN_START + "' + message['role'] + ':' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- elif message['content'] -%}{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}"
    "{{ '" + TURN_END + "' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + TURN_START + "assistant:' }}{%- endif -%}"
)
_EMBEDDING_STD, _HEAD_STD, _NORM_GAIN = 1.0, 0.5, 1.0
_PROJECTION_GAIN = 1.6
_QUERY_KEY_GAIN = 2.0


def ensure_demo_model(environ: Mapping[str, str] = os.environ) -> Path:
    """The model's folder in the user's cache, made in a few seconds where it is missing or of another recipe.

    Raises HeadstartError where the cache can't be written.
    """
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    recipe = blake3(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = cache / "headstart" / "models" / f"{NAME}-{recipe}"
    if not folder.exists():
        try:
            _make_at_once(folder)
        except OSError as error:
            advice = "free some space there, set XDG_CACHE_HOME to another folder, or name a model with --model"
            raise HeadstartError(f"can't write the demo model to {folder}: {error.strerror}; {advice}") from error
    return folder


def _make_at_once(folder: Path) -> None:
    """Makes the model beside ``folder`` and renames it, so that nobody ever sees half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch, folder.name)
        made.mkdir()
        make_model(made)
        try:
            made.rename(folder)
        except OSError:
            # Where another process was faster, its copy is the same.
            if not folder.exists():
                raise


def make_model(folder: Path, *, layers: int = LAYERS, seed: int = SEED) -> None:
    """Writes configuration, tokenizer and weights into ``folder``."""
    _write(folder / "config.json", _config(layers))
    _write(folder / "generation_config.json", {"do_sample": False, "max_new_tokens": ANSWER_TOKENS})
    _tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_TOKENS,
        "chat_template": _CHAT_TEMPLATE,
    }
    _write(folder / "tokenizer_config.json", tokenizer_config)
    save_file(_weights(layers, seed), folder / "model.safetensors", metadata={"format": "pt"})


def alphabet() -> list[str]:
    """The vocabulary's characters by token id."""
    plain = [UNKNOWN, TURN_START, TURN_END, "\n", "\t", *map(chr, range(0x20, 0x7F)), *map(chr, range(0xA1, 0x180))]
    return plain + [chr(0x4E00 + i) for i in range(VOCABULARY - len(plain))]


def _config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({character: number for number, character in enumerate(alphabet())}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _weights(layers: int, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)

    def normal(rows: int, columns: int, std: float) -> np.ndarray:
        return generator.standard_normal((rows, columns), dtype=np.float32) * np.float32(std)

    def projection(rows: int, columns: int, gain: float = _PROJECTION_GAIN) -> np.ndarray:
        return normal(rows, columns, gain / columns**0.5)

    gain = np.full(HIDDEN, _NORM_GAIN, dtype=np.float32)
    weights = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN, _EMBEDDING_STD), "lm_head.weight": normal(VOCABULARY, HIDDEN, _HEAD_STD)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "self_attn.q_proj.weight": projection(HEADS * HEAD_DIM, HIDDEN, _QUERY_KEY_GAIN),
            prefix + "self_attn.k_proj.weight": projection(KV_HEADS * HEAD_DIM, HIDDEN, _QUERY_KEY_GAIN),
            prefix + "self_attn.v_proj.weight": projection(KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.o_proj.weight": projection(HIDDEN, HEADS * HEAD_DIM),
            prefix + "mlp.gate_proj.weight": projection(INTERMEDIATE, HIDDEN),
            prefix + "mlp.up_proj.weight": projection(INTERMEDIATE, HIDDEN),
            prefix + "mlp.down_proj.weight": projection(HIDDEN, INTERMEDIATE),
            prefix + "input_layernorm.weight": gain,
            prefix + "post_attention_layernorm.weight": gain,
        }
    weights["model.norm.weight"] = gain
    return weights


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False))
