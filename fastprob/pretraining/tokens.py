"""Vocabularies: BERT's tokenizer over the words of some captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from transformers import BertTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def words_of(captions: Iterable[str], size: int = 30_000) -> BertTokenizer:
    """A tokenizer that has the captions' most frequent words, all their characters, and at most `size` tokens.

    It depends on the captions alone: of words as frequent as each other the first by the alphabet is taken. Words that
    it lacks are spelt.

    Raises:
        ValueError: for a size below the number of special tokens and characters.
    """
    plain = BertTokenizer().backend_tokenizer
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(word for word, _ in plain.pre_tokenizer.pre_tokenize_str(plain.normalizer.normalize_str(caption)))
    letters = sorted(set("".join(counts)))
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    if size < len(pieces):
        raise ValueError(f"words_of: size must be at least {len(pieces)} for these captions' characters, got {size}")
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    return BertTokenizer(vocab={piece: i for i, piece in enumerate([*pieces, *words[: size - len(pieces)]])})
