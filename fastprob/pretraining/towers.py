"""Image and text towers with what ALBEF and BLIP put on them, and the momentum teacher that follows them."""

from __future__ import annotations

from dataclasses import replace

from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextOnlyMLMHead

from fastprob.encoders.towers import ImageTower
from fastprob.pretraining.momentum import Queue, follow, twin_of
from fastprob.pretraining.text import ImageKeys, Texts, bert, encode


class Towers(nn.Module):
    """An image and a text tower, each with a projection of its first state to D: what contrast compares.

    visual: open_clip's vision transformer; text: of `bert`; dim: D.
    """

    def __init__(self, visual: VisionTransformer, config: BlipTextConfig, dim: int, *, layers: int, images: bool):
        super().__init__()
        self.visual = visual
        self.text = bert(config, layers=layers, images=images)
        self.image_projection = nn.Linear(config.encoder_hidden_size, dim)
        self.text_projection = nn.Linear(config.hidden_size, dim)

    def images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features [I, D] and states [I, N, d] of images [I, 3, H, W]."""
        states = ImageTower(self).states(pixels)
        return F.normalize(self.image_projection(states[:, 0]), dim=-1), states

    def texts(self, texts: Texts) -> tuple[Tensor, Texts]:
        """Unit features [R, D] of texts by themselves, and the texts as `fuse` takes them."""
        states = encode(self.text, texts)
        return F.normalize(self.text_projection(states[:, 0]), dim=-1), self.read(texts, states)

    def read(self, texts: Texts, states: Tensor) -> Texts:
        """Texts with what of their states [R, T, d] `fuse` needs."""
        raise NotImplementedError

    def fuse(self, texts: Texts, keys: ImageKeys) -> Tensor:
        """States [R, T, d] of texts, as they have been read, that have seen their images."""
        raise NotImplementedError


class AlbefTowers(Towers):
    """ALBEF's: the lower half of BERT reads texts, the upper half goes on from there with images."""

    def __init__(self, visual: VisionTransformer, config: BlipTextConfig, dim: int):
        layers = config.num_hidden_layers
        super().__init__(visual, config, dim, layers=layers // 2, images=False)
        self.fusion = bert(config, layers=layers - layers // 2, images=True)
        self.fusion.embeddings = nn.Identity()  # it begins with states
        self.words = BlipTextOnlyMLMHead(config)
        self.words.predictions.decoder.weight = self.text.embeddings.word_embeddings.weight
        self.words.predictions.decoder.bias = self.words.predictions.bias

    def read(self, texts: Texts, states: Tensor) -> Texts:
        return replace(texts, states=states)

    def fuse(self, texts: Texts, keys: ImageKeys) -> Tensor:
        return encode(self.fusion, texts, keys)

    def tell(self, texts: Texts, hidden: Tensor, keys: ImageKeys) -> Tensor:
        """Scores [C, V] of all words where `hidden`, [R, T] bool, is true."""
        return self.words(self.fuse(self.texts(texts)[1], keys)[hidden])


class BlipTowers(Towers):
    """BLIP's: one BERT reads texts, without its cross-attention; or anew with it, and [ENC] for the first token.

    enc: the id of [ENC].
    """

    def __init__(self, visual: VisionTransformer, config: BlipTextConfig, dim: int, enc: int):
        super().__init__(visual, config, dim, layers=config.num_hidden_layers, images=True)
        self.enc = enc

    def read(self, texts: Texts, states: Tensor) -> Texts:
        return texts

    def fuse(self, texts: Texts, keys: ImageKeys) -> Tensor:
        return encode(self.text, texts.starting_with(self.enc), keys)


class Teacher(nn.Module):
    """A twin of a model's towers that follows them, and a queue of what it made of the last pairs.

    Args:
        towers: the model's; size: of the queue; momentum: of `follow`; seed: of the queue's first vectors.
    """

    def __init__(self, towers: nn.Module, size: int, *, momentum: float = 0.995, seed: int = 0):
        super().__init__()
        self.twin = twin_of(towers)
        self.queue = Queue(size, towers.image_projection.out_features, seed=seed)
        self.momentum = momentum

    def follow(self, towers: nn.Module) -> None:
        """One step towards the towers, as `fastprob.pretraining.follow`."""
        follow(self.twin, towers, self.momentum)

    def train(self, mode: bool = True) -> Teacher:
        """The twin stays in evaluation mode."""
        return super().train(False)
