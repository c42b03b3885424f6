"""Tokenizers of the kinds that models have, trained on the spot from a text of this repository."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
"""With line breaks themselves, as DeepSeek's file has it."""
CHAT = ("<|im_start|>", "<|im_end|>", "<|end|>", "<|end|>|>", "<s>", "</s>")
"""One is the beginning of another."""

HARD = "don't We're it's! word!\n\nWord.\n word, two  12 345\t(x)\r\n 'S word's\n Word 1.5 word...\n\n\n two's x='re 12\n"
"""What expressions split in different ways."""
WINDOW = 50
"""Characters of a text for training: a token is within one."""


def text_of_ours() -> str:
    """A text with words, code, figures and several scripts."""
    root = Path(__file__).parents[2]
    ours = "".join((root / name).read_text() for name in ("README.md", "DECISIONS.md"))
    return (
        ours
        + "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \ud55c\uae00 \u043f\u0440\u0438\u0432\u0435\u0442 caf\u00e9 cafe\u0301 "
        * 40
    )


def special(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, special=True, **{"normalized": False, **flags})


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator([text_of_ours()], trainer)
    return tokenizer


@functools.cache
def _merged() -> str:
    """Byte-level BPE trained on text that is split nowhere, so its tokens reach over words: a text that is split otherwise has other tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    text = text_of_ours() + HARD * 40
    tokenizer.train_from_iterator([text[at : at + WINDOW] for at in range(0, len(text), WINDOW)], trainer)
    return tokenizer.to_str()


def byte_level(expression: str = "", *, prefix_space: bool = False, nfc: bool = False) -> Tokenizer:
    """Byte-level BPE with GPT-2's expression, or another one."""
    tokenizer = Tokenizer.from_str(_merged())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    if expression:
        stages = [pre_tokenizers.Split(Regex(expression), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(stages)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([special(content) for content in CHAT])
    return tokenizer


def deepseek() -> Tokenizer:
    """Three expressions, one after another."""
    tokenizer = byte_level(DEEPSEEK)
    before = (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK)
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in before]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def star_coder(*, prefix_space: bool = False) -> Tokenizer:
    """GPT-2's, with each digit by itself."""
    tokenizer = byte_level()
    stages = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(stages)
    return tokenizer


def metaspace(scheme: str, *, model: str = "unigram") -> Tokenizer:
    """What SentencePiece models become: Unigram or BPE with a sign for spaces."""
    if model == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer: trainers.Trainer = trainers.UnigramTrainer(vocab_size=800, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<unk>"], show_progress=False)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=model == "unigram")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    _trained(tokenizer, trainer)
    tokenizer.add_tokens([special(content) for content in CHAT])
    return tokenizer


def prepended() -> Tokenizer:
    """Llama 2's form: the sign for spaces comes from normalisers, and no pre-tokenizer splits anything."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    _trained(tokenizer, trainers.BpeTrainer(vocab_size=1000, special_tokens=["<unk>"], show_progress=False))
    tokenizer.pre_tokenizer = None
    tokenizer.add_tokens([special(content) for content in CHAT])
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's form."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=1000, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False))
    tokenizer.add_tokens([special(content) for content in CHAT])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]")))
    return tokenizer


def with_ends() -> Tokenizer:
    """Adds BOS and EOS."""
    tokenizer = byte_level(LLAMA3)
    ends = [(content, tokenizer.token_to_id(content)) for content in ("<s>", "</s>")]
    template = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def with_flags() -> Tokenizer:
    """Added tokens of all flags, some that are words or white space, and some that overlap."""
    tokenizer = byte_level(LLAMA3)
    flags = [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}, {"normalized": True}]
    tokenizer.add_tokens([special(f"<{''.join(each)}>", **each) for each in flags])
    tokenizer.add_tokens(
        [special("word", single_word=True), special("  "), special("\n\n"), special("Word"), special("x='"), special("two", rstrip=True)]
    )
    tokenizer.add_tokens([special("..", normalized=True), special("d ", normalized=True)])
    return tokenizer


def by_character() -> Tokenizer:
    """The demo model's form."""
    tokenizer = Tokenizer(models.WordLevel({character: at for at, character in enumerate(["?", *map(chr, range(32, 127))])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": byte_level,
    "GPT-2 with a prefix space": functools.partial(byte_level, prefix_space=True),
    "Qwen 2": functools.partial(byte_level, QWEN2, nfc=True),
    "Llama 3": functools.partial(byte_level, LLAMA3),
    "Llama 3 with a prefix space": functools.partial(byte_level, LLAMA3, prefix_space=True),
    "o200k": functools.partial(byte_level, O200K),
    "DeepSeek V3": deepseek,
    "StarCoder": star_coder,
    "StarCoder with a prefix space": functools.partial(star_coder, prefix_space=True),
    "Metaspace always": functools.partial(metaspace, "always"),
    "Metaspace first": functools.partial(metaspace, "first"),
    "Metaspace never": functools.partial(metaspace, "never"),
    "Metaspace first, BPE, words together": functools.partial(metaspace, "first", model="bpe"),
    "Llama 2": prepended,
    "BERT": word_piece,
    "BOS and EOS": with_ends,
    "added tokens of all flags": with_flags,
    "characters": by_character,
}
WORDS_CUT = (
    *("GPT-2", "GPT-2 with a prefix space", "Qwen 2", "Llama 3", "Llama 3 with a prefix space", "o200k", "DeepSeek V3"),
    *("StarCoder", "StarCoder with a prefix space", "BOS and EOS", "characters"),
)
"""Kinds whose texts may be cut between words."""


@functools.cache
def of_kind(name: str) -> PreTrainedTokenizerFast:
    return fast(KINDS[name]())
