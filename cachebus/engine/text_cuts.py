r"""Where a text may be cut so that its parts' token ids, one after another, are the whole text's. Pure.

A Hugging Face tokenizer looks for its added tokens first, in the text as it is, and works on each piece between two of them by itself. So a text may
be cut where an added token begins. Not behind one: some tokenizers treat a text's first piece unlike the others (Metaspace with ``first``), and
behind a cut every piece would be a first one. Not at a token that takes white space before it (``lstrip``) or looks at what is beside it
(``single_word``), and none of those that are looked for after normalisation counts here.

A piece itself may be cut between a letter and what follows a word, if no pre-token can have both. That is so for the regular expressions that most
models use. They are alternations, and of each known alternative (``_ALTERNATIVES``) it holds that

- no match has a letter followed by white space or punctuation, so one that has the letter ends there;
- what is looked at beyond a match is the one character behind a run of white space, and such a run doesn't end at a letter's right side;
- nothing looks back.

Stages before that one may take out runs of digits, or of Chinese and Japanese characters: none has what follows a word, so none reaches over a cut.

Hence the matches before the cut are those of the text that ends there, and those after it those of the text that begins there. Letters and what
follows them are characters that NFC neither changes nor joins. Wherever an expression has an alternative that is not known, pieces stay whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

SEGMENT_CHARS_MIN = 128
"""No cut before a segment has so many characters: each costs some microseconds, however short it is."""
SEGMENT_CHARS_LONG = 2048
"""From here on a segment is cut behind the next word: so much at most is tokenised again when a text goes on otherwise."""
_TOKEN_CHARS_MAX = 200

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_LETTERS = (
    frozenset([r"[^\r\n\p{L}\p{N}]?\p{L}+"]),
    frozenset([r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"]),
    frozenset([r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"]),
    frozenset([r" ?\p{L}+"]),
    frozenset([_LOWER, _UPPER]),
    frozenset([f"{_LOWER}{_CONTRACTION}?", f"{_UPPER}{_CONTRACTION}?"]),
    frozenset([r"[\s\S]"]),
)
"""Alternatives that together match every letter: what none matches would be one pre-token with what is beside it."""
_ALTERNATIVES = frozenset().union(
    *_LETTERS,
    [_CONTRACTION, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r"'(?i:[sdmt]|ll|ve|re)"],
    [r"\p{N}", r"\p{N}{1,3}", r" ?\p{N}+"],
    [r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"],
    [r" ?[\p{P}\p{S}]+[\r\n]*", r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""],
    [r"\s*[\r\n]", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"],
)
_RUNS = frozenset([r"\p{N}", r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"])
"""Expressions of stages before the one that splits words: runs of characters that never follow a word."""

_LETTER = "A-Za-z\u0410-\u044f\u3041-\u3096\u4e00-\u9fff\uac00-\ud7a3"
_SPACE, _OTHERS = " ", "\n.,\uff0c\u3002\u3001"


@dataclass(frozen=True)
class TextCuts:
    """One tokenizer's rules.

    ``tokens`` finds the added tokens that are looked for in the text as it is; ``starts`` and ``single_words`` are the contents of those
    that a segment may begin with and of those that look beside them; ``words`` finds where a piece may be cut, None: nowhere.
    """

    tokens: re.Pattern[str] | None
    starts: frozenset[str]
    single_words: frozenset[str]
    words: re.Pattern[str] | None

    def of(self, text: str, chars_min: int = SEGMENT_CHARS_MIN, chars_long: int = SEGMENT_CHARS_LONG) -> list[int]:
        """Where the segments of a text begin, the first at 0. A cut depends on the text before it alone, so texts that begin alike are cut alike."""
        cuts, piece, single_word_end = [0], 0, -1
        for match in self.tokens.finditer(text) if self.tokens else ():
            self._cut_words(text, piece, match.start(), cuts, chars_long)
            found, start = match.group(), match.start()
            if found in self.starts and start - cuts[-1] >= chars_min and start > single_word_end:
                cuts.append(start)
            piece = match.end()
            if found in self.single_words:
                single_word_end = piece
        self._cut_words(text, piece, len(text), cuts, chars_long)
        return cuts

    def _cut_words(self, text: str, start: int, end: int, cuts: list[int], chars_long: int) -> None:
        """Cuts the piece from ``start`` to ``end``."""
        while self.words and (match := self.words.search(text, max(cuts[-1] + chars_long, start + 1), end)):
            cuts.append(match.start())


def text_cuts(config: dict[str, Any]) -> TextCuts:
    """The rules of a tokenizer, from its ``tokenizer.json``. Raises ValueError where it has an added token that nobody can look for here."""
    added = config.get("added_tokens") or []
    raw = [token for token in added if not token["normalized"]]
    if any(not 0 < len(token["content"]) <= _TOKEN_CHARS_MAX for token in raw):
        raise ValueError(f"an added token is empty, or longer than {_TOKEN_CHARS_MAX} characters")
    starts = [token["content"] for token in raw if not token["lstrip"] and not token["single_word"] and not token["content"][0].isspace()]
    words = _words(config)
    if words and any(words.search(token["content"]) for token in added if token["normalized"]):
        words = None
    return TextCuts(
        tokens=re.compile(_any_of(token["content"] for token in raw)) if raw else None,
        starts=frozenset(starts),
        single_words=frozenset(token["content"] for token in raw if token["single_word"]),
        words=words,
    )


def _words(config: dict[str, Any]) -> re.Pattern[str] | None:
    """What finds where a piece may be cut; None where nothing proves that any place will do."""
    if any(normalizer["type"] != "NFC" for normalizer in _parts(config.get("normalizer"), "normalizers")):
        return None
    stages = _parts(config.get("pre_tokenizer"), "pretokenizers")
    byte_level = stages.pop() if stages and stages[-1]["type"] == "ByteLevel" else None
    splits_itself = byte_level is not None and byte_level["use_regex"]
    if not (splits_itself or (stages and _separates_words(stages.pop()))) or not all(map(_separates_runs, stages)):
        return None
    # Where a piece without a space before it is given one, a segment must have its own.
    behind = _SPACE if byte_level is not None and byte_level["add_prefix_space"] else _SPACE + _OTHERS
    return re.compile(f"(?<=[{_LETTER}])[{behind}]")


def _parts(node: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """A normaliser or pre-tokenizer, or those of which it is a sequence."""
    if node is None:
        return []
    return list(node[name]) if node["type"] == "Sequence" else [node]


def _separates_runs(stage: dict[str, Any]) -> bool:
    whole = stage["type"] == "Split" and (stage["behavior"], stage["invert"]) == ("Isolated", False)
    return stage["type"] == "Digits" or (whole and stage["pattern"].get("Regex") in _RUNS)


def _separates_words(stage: dict[str, Any]) -> bool:
    if stage["type"] != "Split" or (stage["behavior"], stage["invert"]) not in (("Isolated", False), ("Removed", True)):
        return False
    # Some files have the line breaks themselves.
    expression = stage["pattern"].get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
    alternatives = set(_alternatives(expression))
    return alternatives <= _ALTERNATIVES and any(letters <= alternatives for letters in _LETTERS)


def _alternatives(expression: str) -> list[str]:
    """The alternatives of a regular expression; what is in brackets stays together."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"\\.|[\[(\])|]", expression):
        depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(match.group(), 0)
        if match.group() == "|" and not depth:
            parts.append(expression[start : match.start()])
            start = match.end()
    return [*parts, expression[start:]]


def _any_of(contents: Iterable[str]) -> str:
    """An expression that finds the leftmost of these, and of several that begin there the longest, in time that does not depend on their number."""
    tree: dict[str, Any] = {}
    for content in contents:
        node = tree
        for character in content:
            node = node.setdefault(character, {})
        node[""] = {}
    return _branches(tree)


def _branches(node: dict[str, Any]) -> str:
    chains: Sequence[str] = [re.escape(character) + _branches(child) for character, child in node.items() if character]
    if not chains:
        return ""
    together = "(?:" + "|".join(chains) + ")" if len(chains) > 1 or "" in node else chains[0]
    return together + "?" if "" in node else together
