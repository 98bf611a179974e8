"""Which tokens make up a word of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Word(NamedTuple):
    """A word as it stands in the text, between white space, and its tokens, from start to stop - 1."""

    text: str
    start: int
    stop: int


def words_of(tokenizer: Callable[..., Tensor], texts: Sequence[str]) -> tuple[Tensor, list[list[Word]]]:
    """Token ids [P, T], and of every text its words that have tokens: those that the context has room for.

    A word ends where the tokens of the text up to it stop to be those of the whole text, whichever way the tokenizer
    marks the pieces of a word.
    """
    empty, ids = tokenizer([""])[0], tokenizer(list(texts))
    return ids, [_words(tokenizer, text, row, empty) for text, row in zip(texts, ids)]


def _words(tokenizer: Callable[..., Tensor], text: str, ids: Tensor, empty: Tensor) -> list[Word]:
    start = int(ids[0] == empty[0])  # behind the start-of-text token, if there is one
    ends = (ids == empty[start]).nonzero()[:, 0]
    stop = int(ends[0]) if len(ends) else len(ids)
    words, at = [], start
    parts = text.split()
    for i, part in enumerate(parts):
        same = tokenizer([" ".join(parts[: i + 1])])[0] == ids
        end = min(int(same.int().cumprod(0).sum()), stop)
        if end > at:
            words.append(Word(part, at, end))
            at = end
    return words


def membership(words: Sequence[Sequence[Word]], length: int) -> Tensor:
    """[P, W, T] bool, which of T tokens are of a text's word; W: the most words of a text, at least 1."""
    member = torch.zeros(len(words), max(1, *map(len, words)), length, dtype=torch.bool)
    for row, of_text in zip(member, words):
        for tokens, word in zip(row, of_text):
            tokens[word.start : word.stop] = True
    return member
