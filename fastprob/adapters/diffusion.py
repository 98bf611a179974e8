"""Pictures of embeddings, by a latent diffusion model that is conditioned on CLIP image embeddings (stable unCLIP).

The pipeline is diffusers' `StableUnCLIPImg2ImgPipeline`. Its checkpoints belong to one image encoder each, and only an
adapter over that encoder's embeddings has draws that it can decode:

    checkpoint                                    width   encoder, by open_clip's names
    stabilityai/stable-diffusion-2-1-unclip       1024    ViT-H-14 laion2b_s32b_b79k
    stabilityai/stable-diffusion-2-1-unclip-small 768     ViT-L-14 openai

Embeddings here have unit norm, the pipeline takes them as its encoder gives them. It holds their mean m and standard
deviation s per dimension, so that their mean square norm is sum(m^2 + s^2): unit rows are multiplied by its root. What
is lost is how norms differ between pictures. The pipeline has learnt from embeddings of images: those that an adapter
predicts for a text are as far from them as the encoder keeps texts and images apart.
"""

from __future__ import annotations

import os

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

_PIPELINE = "StableUnCLIPImg2ImgPipeline"

_SAME_SPACE = 0.5
"""Least cosine between embeddings of a picture by one encoder; it is nearly 1, of two encoders about 0."""


class Decoder:
    """Decodes embeddings into pictures.

    Args:
        name: directory of a saved `StableUnCLIPImg2ImgPipeline`, weights in safetensors, or its name on the hub.
        dim: the embeddings' width D.
        device: that the pipeline runs on, in float32.

    Raises:
        ValueError: another pipeline, or one for embeddings of another width.
        OSError: no such pipeline.
        ImportError: without diffusers and transformers.
    """

    def __init__(self, name: str | os.PathLike, *, dim: int, device: str | torch.device = "cpu"):
        try:
            from diffusers import DiffusionPipeline, StableUnCLIPImg2ImgPipeline
            from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
        except ImportError as error:
            raise ImportError("decoding needs diffusers: pip install 'fastprob[diffusion]'") from error
        kind = DiffusionPipeline.load_config(name)["_class_name"]
        if kind != _PIPELINE:
            raise ValueError(f"Decoder: {name} must be a {_PIPELINE}, got a {kind}")
        width = StableUnCLIPImageNormalizer.load_config(name, subfolder="image_normalizer")["embedding_dim"]
        if width != dim:
            raise ValueError(f"Decoder: {name} takes embeddings of width {width}, these have {dim}: another encoder's")
        options = {"use_safetensors": True, "low_cpu_mem_usage": False}  # True needs accelerate
        self.name = name
        self.pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(name, **options).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        moments = self.pipeline.image_normalizer.mean.detach(), self.pipeline.image_normalizer.std.detach()
        self.norm = float(torch.cat(moments).norm())

    def __call__(self, embeddings: Tensor, *, seed: int = 0, progress: bool = True) -> list[Image]:
        """[Q, D] of unit norm -> Q pictures. All start from the same noise: what differs is the embedding."""
        return [self._decode(row, seed) for row in tqdm(embeddings, desc="decode", disable=not progress)]

    def _decode(self, embedding: Tensor, seed: int) -> Image:
        scaled = (self.norm * embedding[None]).to(self.pipeline.device)
        return self.pipeline(image_embeds=scaled, generator=torch.Generator().manual_seed(seed)).images[0]

    @torch.no_grad()
    def check(self, picture: Image, embedding: Tensor) -> None:
        """Raise ValueError unless the pipeline's own encoder gives the picture about this embedding [D].

        Equal widths are not enough: draws from another encoder's space decode to pictures of nothing.
        """
        pixels = self.pipeline.feature_extractor(images=picture, return_tensors="pt").pixel_values
        own = self.pipeline.image_encoder(pixels.to(self.pipeline.device)).image_embeds[0].cpu()
        cosine = float(cosine_similarity(own, embedding, dim=0))
        if not cosine >= _SAME_SPACE:
            got = f"of a picture its encoder and theirs make embeddings of cosine {cosine:.2f}"
            raise ValueError(f"Decoder: {self.name} must belong to the encoder of the embeddings: {got}")
