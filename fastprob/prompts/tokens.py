"""Where a prompt's context vectors, class name and end-of-text stand among its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POSITIONS = ("end", "middle", "front")
PLACEHOLDER = "x"  # stands in the text for a context vector


@dataclass(frozen=True)
class PromptTokens:
    """The prompts of C classes: T tokens each, L of them context vectors to come.

    ids: [C, T]; slots: [C, L], the context's positions; ends: [C], the end-of-text token's position; start: how many
    tokens come before all these; lengths: of the prompts, up to end-of-text.
    """

    ids: Tensor
    slots: Tensor
    ends: Tensor
    start: int
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> PromptTokens:
        moved = (t.to(device) for t in (self.ids, self.slots, self.ends))
        return PromptTokens(*moved, self.start, self.lengths)


def prompt_tokens(
    tokenizer: Callable[..., Tensor], classnames: Sequence[str], context_length: int, class_position: str
) -> PromptTokens:
    """The tokens of "<context> <name>." for every class, as CoOp builds them: "_" in a name is a space.

    class_position: where the name stands: "end" (behind the context), "front", or "middle" (between its halves). There
    the name is as many of the tokens behind the context as it has by itself, as in CoOp: the full stop may be in one
    token with what ends the name ("crane (bird).") and then moves with it.

    Raises ValueError for no names, a name that leaves no room, or a tokenizer that splits words in another way.
    """
    if not classnames or isinstance(classnames, str):
        raise ValueError(f"PromptTextEncoder: classnames must be a list of names, got {classnames!r}")
    if class_position not in POSITIONS:
        expected = ", ".join(map(repr, POSITIONS))
        raise ValueError(f"PromptTextEncoder: class_position must be one of {expected}, got {class_position!r}")
    if context_length < 1:
        raise ValueError(f"PromptTextEncoder: context_length must be at least 1, got {context_length}")
    names = [name.replace("_", " ") for name in classnames]
    pair = tokenizer([f"{PLACEHOLDER} {PLACEHOLDER}"])[0].tolist()
    start = int(pair[0] != pair[1])  # of the context: behind the start-of-text token, if there is one
    placeholder, after = pair[start], pair[start + 2]

    def tokens_up_to_end(texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = tokenizer(texts)  # [C, T]
        return ids, (ids == after).int().argmax(dim=1)  # of the first one: some tokenizers pad with it

    ids, ends = tokens_up_to_end([f"{' '.join([PLACEHOLDER] * context_length)} {name}." for name in names])
    _, alone = tokens_up_to_end([f"{name}." for name in names])
    for name, end, wanted in zip(classnames, ends.tolist(), (alone + context_length).tolist()):
        if end != wanted:
            raise ValueError(
                f"PromptTextEncoder: classnames must leave room for {context_length} context vectors among "
                f"{ids.shape[1]} tokens, got {name!r}"
            )
    first = start + context_length  # behind the context
    if pair[start + 1] != placeholder or (ids[:, start:first] != placeholder).any():
        raise ValueError("PromptTextEncoder: tokenizer must give one token to each single letter between spaces")
    slots = torch.arange(start, first).repeat(len(names), 1)
    if class_position != "end":
        ahead = context_length // 2 if class_position == "middle" else 0
        _, name_ends = tokens_up_to_end(names)
        for row, length in enumerate((name_ends - start).tolist()):
            moved = start + ahead + length
            ids[row, start : first + length] = torch.cat([
                ids[row, start : start + ahead], ids[row, first : first + length], ids[row, start + ahead : first]
            ])  # fmt: skip
            slots[row, ahead:] = torch.arange(moved, first + length)
    return PromptTokens(ids, slots, ends, start, tuple(end + 1 for end in ends.tolist()))
