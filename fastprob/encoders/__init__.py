"""Frozen vision-language encoders, all through open_clip's factory."""

from fastprob.encoders.encoder import Encoder, load_encoder

__all__ = ["Encoder", "load_encoder"]
