"""Captions of Fashion-MNIST's classes, and the small vocabulary of the text encoders trained on them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from open_clip.tokenizer import bytes_to_unicode
from transformers import CLIPTokenizer

from evalbench.models.nets import CLASS_NAMES, named

CONTEXT = 12  # tokens per text of the generative models, start and end included
# {a} is the name with its article, {n} the name alone
TEMPLATES = (
    "a photo of {a}",
    "a photo of one {n}",
    "a picture of {a}",
    "an image of {a}",
    "a grey photo of {a}",
    "a small photo of {a}",
    "a photo of the {n}",
    "the {n} in a photo",
    "{a}",
    "{n}",
)


def captions() -> list[list[str]]:
    """All captions of each class."""
    return [[template.format(a=named(name), n=name) for template in TEMPLATES] for name in CLASS_NAMES]


def learn_merges(texts: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) until every word of the texts is one token; ties by alphabet."""
    counts = Counter(word for text in texts for word in text.replace("-", " - ").split())
    words = {word: (*word[:-1], f"{word[-1]}</w>") for word in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        words = {word: _merged(parts, merges[-1]) for word, parts in words.items()}


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    i = 0
    while i < len(parts):
        both = parts[i : i + 2] == pair
        merged.append("".join(pair) if both else parts[i])
        i += 2 if both else 1
    return tuple(merged)


def clip_tokenizer(context: int) -> Any:
    """transformers' CLIP tokeniser over these merges: bytes, bytes that end a word, merges, start and end.

    Args:
        context: tokens per text, start and end included; shorter texts are padded with the end token.
    """
    merges = learn_merges([text for of_class in captions() for text in of_class])
    symbols = list(bytes_to_unicode().values())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    kind: Any = CLIPTokenizer
    return kind(vocab=vocab, merges=merges, model_max_length=context)


def token_table(tokenizer: Any) -> torch.Tensor:
    """Captions as tokens, int64 (11, templates, context): those of each class, and last the empty text."""
    texts = [*captions(), [""] * len(TEMPLATES)]
    read = [tokenizer(of_class, padding="max_length", return_tensors="pt").input_ids for of_class in texts]
    return torch.stack(read)
