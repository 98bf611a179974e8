"""What a tokenizer loses of texts: the ends of those that are too long, and words that it does not know."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_AT_ONCE = 4096  # texts


@dataclass(frozen=True)
class Lost:
    """Share of the texts that are cut off, and of the tokens that stand for anything unknown."""

    cut: float
    unknown: float

    def __str__(self) -> str:
        return f"{self.cut:.1%} of the captions are cut off, {self.unknown:.1%} of their tokens are unknown"


def lost(tokenizer: Callable, texts: Sequence[str]) -> Lost:
    """What one of open_clip's tokenizers loses of the texts.

    A text is cut off where one token more of context changes its tokens. A tokenizer that spells what it does not know,
    as those of CLIP do, has no unknown tokens.
    """
    if not texts:
        return Lost(0.0, 0.0)
    empty = tokenizer([""])
    length = empty.shape[1]
    padding = tokenizer([""], context_length=length + 1)[0, -1]
    mark = getattr(getattr(tokenizer, "tokenizer", None), "unk_token_id", None)
    if mark is not None and mark in empty:  # CLIP's mark of an end stands for unknown tokens too
        mark = None
    cut = unknown = tokens = 0
    for start in range(0, len(texts), _AT_ONCE):
        some = list(texts[start : start + _AT_ONCE])
        as_used, longer = tokenizer(some), tokenizer(some, context_length=length + 1)
        cut += int(((longer[:, :-1] != as_used).any(1) | (longer[:, -1] != padding)).sum())
        unknown += 0 if mark is None else int((as_used == mark).sum())
        tokens += int((as_used != padding).sum())
    return Lost(cut / len(texts), unknown / max(tokens, 1))
