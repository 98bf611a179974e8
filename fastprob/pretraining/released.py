"""Weights that ALBEF's and BLIP's repositories and transformers' BLIP have released.

| here | ALBEF, BLIP | transformers |
|---|---|---|
| towers.visual.conv1 | visual_encoder.patch_embed.proj | vision_model.embeddings.patch_embedding |
| towers.visual.class_embedding | .cls_token | .embeddings.class_embedding |
| towers.visual.positional_embedding | .pos_embed | .embeddings.position_embedding |
| towers.visual.transformer.resblocks.N | .blocks.N | .encoder.layers.N |
| .ln_1, .ln_2 | .norm1, .norm2 | .layer_norm1, .layer_norm2 |
| .attn.in_proj_weight, .attn.out_proj | .attn.qkv, .attn.proj | .self_attn.qkv, .self_attn.projection |
| .mlp.c_fc, .mlp.c_proj | .mlp.fc1, .mlp.fc2 | .mlp.fc1, .mlp.fc2 |
| towers.visual.ln_post | .norm | .post_layernorm |
| towers.text | text_encoder (ALBEF: .bert, the lower layers) | text_encoder |
| towers.fusion, towers.words | ALBEF: text_encoder.bert, the upper layers; .cls | |
| decoder | text_decoder | text_decoder |
| towers.image_projection, .text_projection | vision_proj, text_proj | vision_proj, text_proj |
| matching | itm_head | itm_head |
| contrast.temperature | temp | |

open_clip's patches have no bias: the released one is added to the position of every patch. Momentum weights and queues
of a checkpoint are left out.
"""

from __future__ import annotations

import math
import os
import re
from functools import partial
from pathlib import Path

import torch
from open_clip.transformer import LayerNorm, VisionTransformer
from torch import Tensor
from transformers import BlipTextConfig, PreTrainedTokenizerBase

from fastprob._files import is_state_dict, read_pickle, read_tensors
from fastprob.pretraining.objectives import ALBEF, BLIP

_HEAD = 64
"""States of a head, in all that is released."""
_OF_IMAGES = (
    (r"^(visual_encoder|vision_model)\.", "towers.visual."),
    (r"\.embeddings\.", "."),
    (r"\.(patch_embed\.proj|patch_embedding)\.", ".conv1."),
    (r"\.(cls_token|class_embedding)$", ".class_embedding"),
    (r"\.(pos_embed|position_embedding)$", ".positional_embedding"),
    (r"\.(blocks|encoder\.layers)\.", ".transformer.resblocks."),
    (r"\.(norm|layer_norm)([12])\.", r".ln_\2."),
    (r"\.(attn|self_attn)\.qkv\.(weight|bias)", r".attn.in_proj_\2"),
    (r"\.(attn\.proj|self_attn\.projection)\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.(norm|post_layernorm)\.", ".ln_post."),
)
_LEFT_OUT = re.compile(r"_m\.|^(image|text|idx)_queue|^queue_|position_ids$")
_CROSSED = re.compile(r"text_(?:encoder|decoder)\.(?:bert\.)?encoder\.layer\.(\d+)\.crossattention\.")
_PARTS = {
    "decoder": r"decoder\.",
    "text": r"towers\.(text|fusion)\.",
    "words": r"towers\.words\.",
    "visual": r"towers\.visual\.",
    "projections": r"towers\.(image|text)_projection\.",
    "matching": r"matching\.",
    "temperature": r"contrast\.",
}
_OF_HEADS = {
    "vision_proj": "towers.image_projection",
    "text_proj": "towers.text_projection",
    "itm_head": "matching",
    "temp": "contrast.temperature",
}


def load_released(path: str | os.PathLike, tokenizer: PreTrainedTokenizerBase) -> tuple[ALBEF | BLIP, list[str]]:
    """A released model, in evaluation mode on the CPU, and the parts that its file does not have.

    Such a part is as it began, by chance: a retrieval checkpoint has no "decoder"; a captioning one has no "matching",
    "projections", "temperature" and "text", the text tower's attention to itself.

    Args:
        path: .pth of ALBEF or BLIP, or model.safetensors of transformers' BlipForImageTextRetrieval or
            BlipForConditionalGeneration.
        tokenizer: transformers' of bert-base-uncased, whose vocabulary the released ones have.

    Raises:
        ValueError: for another file, or another vocabulary.
    """
    where = f"load_released: {path}"
    weights = {name: weight for name, weight in _read(path).items() if not _LEFT_OUT.search(name)}
    albef, ours = _renamed(weights)
    eps = 1e-5 if any(name.startswith("vision_model.") for name in weights) else 1e-6
    try:
        visual, config = _visual(ours, eps), _bert(ours)
    except KeyError as error:
        raise ValueError(f"{where} must be a checkpoint of ALBEF or BLIP, it has no {error}") from error
    dim = ours.get("towers.image_projection.bias", torch.empty(256)).numel()
    model = (ALBEF if albef else BLIP)(visual, tokenizer, config, dim=dim)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(f"{where} must have the tokenizer's {len(tokenizer)} tokens, got {config.vocab_size}")
    state = model.state_dict()
    odd = [name for name, weight in ours.items() if name not in state or state[name].shape != weight.shape]
    if odd:
        got = f"{odd[0]} {list(ours[odd[0]].shape)}"
        raise ValueError(f"{where} must have the weights of {type(model).__name__} alone, got {got}")
    model.load_state_dict(ours, strict=False)
    given = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in ours}
    missing = (name for name, parameter in model.named_parameters() if id(parameter) not in given)
    return model.eval(), sorted({part for name in missing for part, of in _PARTS.items() if re.match(of, name)})


def _read(path: str | os.PathLike) -> dict[str, Tensor]:
    if Path(path).suffix == ".safetensors":
        return read_tensors("load_released", path)[0]
    state = read_pickle("load_released", path)
    state = state.get("model", state) if isinstance(state, dict) else state
    if not is_state_dict(state):
        raise ValueError(f"load_released: {path} must hold weights by name, got {type(state).__name__}")
    return state


def _renamed(weights: dict[str, Tensor]) -> tuple[bool, dict[str, Tensor]]:
    """Whether they are ALBEF's, and the weights by our names, those of the images as open_clip has them."""
    crossed = [int(found[1]) for name in weights if (found := _CROSSED.match(name))]
    first = min(crossed, default=0)  # ALBEF's lower layers see no image
    ours = {}
    for name, weight in weights.items():
        head, _, rest = name.partition(".")
        if head in ("visual_encoder", "vision_model"):
            for pattern, instead in _OF_IMAGES:
                name = re.sub(pattern, instead, name)
        elif head in _OF_HEADS:
            name = f"{_OF_HEADS[head]}.{rest}".rstrip(".")
        elif head == "text_decoder":
            name = f"decoder.{rest}"
        elif head == "text_encoder" and first:
            name = _of_albef(rest.removeprefix("bert."), first)
        elif head == "text_encoder":
            name = f"towers.text.{rest}"
        ours[name] = weight
    visual = "towers.visual."
    positions, bias = f"{visual}positional_embedding", ours.pop(f"{visual}conv1.bias", None)
    if positions in ours and bias is not None:
        ours[positions] = ours[positions].squeeze(0).clone()
        ours[positions][1:] += bias
        ours[f"{visual}class_embedding"] = ours[f"{visual}class_embedding"].flatten()
    return bool(first), ours


def _of_albef(name: str, first: int) -> str:
    layer = re.match(r"encoder\.layer\.(\d+)\.(.*)", name)
    if layer is None:
        return name.replace("cls.", "towers.words.", 1) if name.startswith("cls.") else f"towers.text.{name}"
    number = int(layer[1])
    tower, number = ("text", number) if number < first else ("fusion", number - first)
    return f"towers.{tower}.encoder.layer.{number}.{layer[2]}"


def _layers(ours: dict[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in ours if (found := re.match(pattern, name))), default=-1)


def _visual(ours: dict[str, Tensor], eps: float) -> VisionTransformer:
    width, _, patch, _ = ours["towers.visual.conv1.weight"].shape
    side = patch * math.isqrt(len(ours["towers.visual.positional_embedding"]) - 1)
    layers = _layers(ours, r"towers\.visual\.transformer\.resblocks\.(\d+)\.")
    norm = partial(LayerNorm, eps=eps)
    visual = VisionTransformer(
        side, patch, width, layers, width // _HEAD, 4.0, output_dim=width, no_ln_pre=True, norm_layer=norm
    )
    visual.proj = None
    return visual


def _bert(ours: dict[str, Tensor]) -> BlipTextConfig:
    of = "towers.text." if "towers.text.embeddings.word_embeddings.weight" in ours else "decoder.bert."
    vocabulary, width = ours[f"{of}embeddings.word_embeddings.weight"].shape
    layer = re.escape(of) + r"encoder\.layer\.(\d+)\."
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(ours[f"{of}encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=_layers(ours, layer) + _layers(ours, r"towers\.fusion\.encoder\.layer\.(\d+)\."),
        num_attention_heads=width // _HEAD,
        max_position_embeddings=len(ours[f"{of}embeddings.position_embeddings.weight"]),
    )
