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

    ids: [C, T]; slots: [C, L], the context's positions; ends: [C], the end-of-text token's position.
    """

    ids: Tensor
    slots: Tensor
    ends: Tensor

    def to(self, device: torch.device) -> PromptTokens:
        return PromptTokens(self.ids.to(device), self.slots.to(device), self.ends.to(device))


def prompt_tokens(
    tokenizer: Callable[..., Tensor], classnames: Sequence[str], context_length: int, class_position: str
) -> PromptTokens:
    """The tokens of "<context> <name>." for every class, as CoOp builds them: "_" in a name is a space.

    class_position: where the name stands: "end" (behind the context), "front", or "middle" (between its halves).
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
    ids = tokenizer([f"{' '.join([PLACEHOLDER] * context_length)} {name}." for name in names])  # [C, T]
    slots = torch.arange(start, start + context_length).repeat(len(names), 1)
    ends = (ids == after).int().argmax(dim=1)  # of the first one: some tokenizers pad with it
    alone = (tokenizer([f"{name}." for name in names]) == after).int().argmax(dim=1)
    for name, end, wanted in zip(classnames, ends.tolist(), (alone + context_length).tolist()):
        if end != wanted:
            raise ValueError(
                f"PromptTextEncoder: classnames must leave room for {context_length} context vectors among "
                f"{ids.shape[1]} tokens, got {name!r}"
            )
    if pair[start + 1] != placeholder or (ids[:, slots[0]] != placeholder).any():
        raise ValueError("PromptTextEncoder: tokenizer must give one token to each single letter between spaces")
    if class_position != "end":
        ahead = context_length // 2 if class_position == "middle" else 0
        for row, end in enumerate(ends.tolist()):
            name = ids[row, start + context_length : end - 1].clone()  # the full stop stays
            moved = start + ahead + len(name)
            ids[row, start + ahead : moved] = name
            ids[row, moved : end - 1] = placeholder
            slots[row, ahead:] = torch.arange(moved, end - 1)
    return PromptTokens(ids, slots, ends)
