"""What the tests of attribution share: small open_clip models of every kind of tower, and a few pairs."""

import json
from functools import partial

import open_clip
import torch

SIZE = (24, 16)  # of images: 3 rows and 2 columns of patches of 8 pixels
CONTEXT = 16
VISION = {"image_size": SIZE, "patch_size": 8, "layers": 4, "width": 48, "head_width": 16}
TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
IMAGE_TOWERS = {  # what differs from CLIP's image tower
    "class token": {},
    "wide, small patches": {"patch_size": 4, "width": 80, "head_width": 20},
    "mean of patches": {"pool_type": "avg", "final_ln_after_pool": True},
    "attentional pool": {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5},
    "custom blocks": {"qk_norm": True, "ls_init_value": 0.5},
}
TEXT_TOWERS = {  # what differs from CLIP's text tower
    "clip": {},
    "eos, wide": {"pool_type": "eos", "eos_id": 49407, "width": 40, "heads": 5},
    "custom blocks": {"qk_norm": True},
    "not causal": {"no_causal_mask": True},
    "padding masked": {"no_causal_mask": True, "use_pad_mask": True},
    "last": {"pool_type": "last", "no_causal_mask": True},
    "class token": {"embed_cls": True},
}
TEXTS = ["a red kaleidoscope", "two dogs", "a photograph of an axolotl in the snow", "cat"]

tokenizer = partial(open_clip.get_tokenizer("ViT-B-32"), context_length=CONTEXT)


def build(tmp_path, image_tower="class token", text_tower="clip", *, dtype=torch.float64, vision=None, text=None):
    """A model of seeded random weights, frozen and in eval mode; vision, text: what else differs in its config."""
    vision = VISION | IMAGE_TOWERS[image_tower] | (vision or {})
    text = TEXT | TEXT_TOWERS[text_tower] | (text or {})
    pad_mask = text.pop("use_pad_mask", False)
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    file = tmp_path / "explained.json"
    file.write_text(json.dumps(config))
    open_clip.add_model_config(file)
    torch.manual_seed(0)
    model = open_clip.create_model("explained").eval().requires_grad_(False)
    if pad_mask:
        model.text.use_pad_mask = True
    for parameter in model.parameters():  # its initial weights are so small that little would show
        parameter.copy_(parameter * 1.5 + 0.02 * torch.randn_like(parameter))
    return model.to(dtype)


def pairs(count=4, dtype=torch.float64):
    """Images [P, 3, H, W] and texts."""
    images = torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images.to(dtype), (TEXTS * count)[:count]
