"""ALBEF and BLIP as modules: towers, and the objectives that train them.

    model = BLIP(visual, tokenizer, config)
    teacher = Teacher(model.towers, 57_600)
    losses = model.losses(images, model.tokenize(captions), ids, teacher, alpha=0.4, seed=step)
    sum(losses.values()).backward()

An image's keys and values, which matching and language modelling attend to, are projected once for both and for all its
texts, and words are scored only where one is to be told. Under torchrun every rank has its share of a batch, and the
mean of the ranks' losses is that of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipTextConfig, PreTrainedTokenizerBase
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from fastprob.pretraining.contrast import ImageTextContrast
from fastprob.pretraining.masking import hide_tokens
from fastprob.pretraining.negatives import hard_negatives
from fastprob.pretraining.text import ImageKeys, Texts, encode
from fastprob.pretraining.towers import AlbefTowers, BlipTowers, Teacher, Towers
from fastprob.training import gathered, mean_over_all, ranks, seed_of, share

ENC, DEC = "[ENC]", "[DEC]"
"""What BLIP's texts begin with: one that sees its image, and one that is told of it."""

SMOOTHING = 0.1
"""Of the labels of BLIP's language modelling."""


class _Objectives(nn.Module):
    """What both train with: contrast and matching."""

    towers: Towers
    names: ClassVar[tuple[str, ...]]
    """Of the losses."""

    special: ClassVar[dict[str, Any]] = {}
    """Tokens that a tokenizer gets where it lacks them."""

    def __init__(
        self,
        visual: VisionTransformer,
        tokenizer: PreTrainedTokenizerBase,
        config: BlipTextConfig,
        *,
        dim: int = 256,
        temperature: float = 0.07,
    ):
        super().__init__()
        tokenizer.add_special_tokens(self.special)
        config = _fitted(config, visual, tokenizer)
        self.tokenizer = tokenizer
        self.length = config.max_position_embeddings
        self.contrast = ImageTextContrast(temperature)
        self.matching = nn.Linear(config.hidden_size, 2)
        self._build(visual, config, dim)

    def _build(self, visual: VisionTransformer, config: BlipTextConfig, dim: int) -> None:
        """Makes the towers, and what else a model has of its own."""
        raise NotImplementedError

    def tokenize(self, captions: Sequence[str]) -> Texts:
        """Texts as long as the longest of them, cut where positions end, on the model's device."""
        made = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        )
        device = self.matching.weight.device
        return Texts(made["input_ids"].to(device), made["attention_mask"].to(device))

    def losses(
        self, images: Tensor, texts: Texts, ids: Tensor, teacher: Teacher, *, alpha: float | Tensor, seed: int
    ) -> dict[str, Tensor]:
        """The objectives of a batch, whose unweighted sum trains the model. The teacher makes a step first, and its
        queue takes the batch.

        Args:
            images: [I, 3, H, W]; texts: R, the first R / I of them of the first image, and so on.
            ids: [I] int64, from 0 up; equal ones are of one image.
            alpha: the teacher's weight, in 0..1.
            seed: of the negatives and of the hidden words.

        Returns:
            Scalars in nats: "itc", image-text contrast; "itm", matching; "mlm" or "lm", language modelling.

        Raises:
            ValueError: where I does not divide R.
        """
        if not len(images) or len(texts) % len(images):
            raise ValueError(f"losses: texts must be a multiple of the {len(images)} images, got {len(texts)}")
        each = len(texts) // len(images)
        dtype = torch.promote_types(torch.float32, images.dtype)
        ids, alpha = ids.repeat_interleave(each), torch.as_tensor(alpha, dtype=dtype, device=images.device)
        image_features, image_states = self.towers.images(images)
        text_features, read = self.towers.texts(texts)
        image_features, keys = image_features.repeat_interleave(each, dim=0), ImageKeys(image_states)
        with torch.no_grad():
            teacher.follow(self.towers)
            image_twins, twin_states = teacher.twin.images(images)
            twins = image_twins.repeat_interleave(each, dim=0), teacher.twin.texts(texts)[0]
        itc = self.contrast(image_features, text_features, twins, ids, teacher.queue, alpha)
        all_ids, *all_twins = (gathered(rows, run=each) for rows in (ids, *twins))

        def negatives(features: Tensor, others: Tensor, number: int) -> tuple[Tensor, ...]:
            """Of all ranks' pairs one for each of this rank's, and whether there is one."""
            similarities = gathered(features.detach(), run=each) @ others.T / self.contrast.temperature
            drawn = hard_negatives(similarities, all_ids, all_ids, seed=seed_of(seed, number))
            return tuple(share(rows, run=each) for rows in drawn)

        to_texts, to_images = negatives(image_features, all_twins[1], 0), negatives(text_features, all_twins[0], 1)
        itm = self._matching(read, keys, to_texts, to_images)
        told = self._language(texts, keys, ImageKeys(twin_states), teacher, alpha, seed_of(seed, 2))
        teacher.queue.add(*all_twins, all_ids)
        return {"itc": itc, "itm": itm, **told}

    def match(self, texts: Texts, keys: ImageKeys) -> Tensor:
        """Logits [R, 2] of no match and of a match of texts, as the towers have read them, with images."""
        return self.matching(self.towers.fuse(texts, keys)[:, 0])

    def _matching(
        self, texts: Texts, keys: ImageKeys, to_texts: tuple[Tensor, ...], to_images: tuple[Tensor, ...]
    ) -> Tensor:
        """Every pair; every image with a text of another; every text with another image."""
        images, each = len(keys.states), len(texts) // len(keys.states)
        (text, has_text), (image, has_image) = to_texts, to_images
        all_texts = texts.map(partial(gathered, run=each))
        mine = share(torch.arange(len(all_texts), device=text.device), run=each)
        with_own = self.match(all_texts[_beside(mine, text, images)], keys)
        others = keys.select(image // each) if ranks() == 1 else ImageKeys(gathered(keys.states)[image // each])
        scores = torch.cat([with_own, self.match(texts, others)])
        true = _beside(torch.ones_like(text), torch.zeros_like(text), images)
        true = torch.cat([true, torch.zeros_like(text)])
        counted = torch.cat([_beside(torch.ones_like(has_text), has_text, images), has_image])
        return mean_over_all(F.cross_entropy(scores, true, reduction="none"), counted)

    def _language(
        self, texts: Texts, keys: ImageKeys, twin_keys: ImageKeys, teacher: Teacher, alpha: Tensor, seed: int
    ) -> dict[str, Tensor]:
        raise NotImplementedError


def _beside(a: Tensor, b: Tensor, images: int) -> Tensor:
    """Two of every text [R], the texts of an image with each other: an image's a, then its b."""
    return torch.cat([a.view(images, -1), b.view(images, -1)], dim=1).flatten()


class ALBEF(_Objectives):
    """ALBEF: contrast, matching and masked language modelling, each word of which the teacher tells too.

    Args:
        visual: open_clip's vision transformer.
        tokenizer: of transformers, with padding, [CLS], [SEP] and [MASK].
        config: sizes of the text tower; its vocabulary, special tokens and the images' width become those of the two.
            Layers above the middle one attend to images.
        dim: of the features that are compared.

    Source:
        ALBEF (Li et al., NeurIPS 2021).
    """

    names = "itc", "itm", "mlm"

    def _build(self, visual: VisionTransformer, config: BlipTextConfig, dim: int) -> None:
        self.towers = AlbefTowers(visual, config, dim)

    def _language(
        self, texts: Texts, keys: ImageKeys, twin_keys: ImageKeys, teacher: Teacher, alpha: Tensor, seed: int
    ) -> dict[str, Tensor]:
        told, run = self.tokenizer, len(texts) // len(keys.states)
        keep = told.pad_token_id, told.cls_token_id
        shown, hidden = (
            share(rows, run=run)
            for rows in hide_tokens(
                gathered(texts.ids, run=run), mask=told.mask_token_id, vocabulary=len(told), keep=keep, seed=seed
            )
        )
        texts, true = Texts(shown, texts.mask), texts.ids[hidden]
        scores = self.towers.tell(texts, hidden, keys)  # [C, V]
        with torch.no_grad():
            soft = teacher.twin.tell(texts, hidden, twin_keys).softmax(dim=-1)
        hard, soft = (F.cross_entropy(scores, target, reduction="none") for target in (true, soft))
        return {"mlm": mean_over_all((1 - alpha) * hard + alpha * soft)}


class BLIP(_Objectives):
    """BLIP: contrast, matching and causal language modelling.

    The decoder has its own self-attention and its own scores of words; all else it shares with the text tower.

    Args:
        visual, tokenizer, config, dim: as of `ALBEF`; the tokenizer gets [DEC] and [ENC] where it lacks them.

    Source:
        BLIP (Li et al., ICML 2022).
    """

    names = "itc", "itm", "lm"
    special: ClassVar = {"bos_token": DEC, "additional_special_tokens": [ENC]}

    def _build(self, visual: VisionTransformer, config: BlipTextConfig, dim: int) -> None:
        self.towers = BlipTowers(visual, config, dim, self.tokenizer.convert_tokens_to_ids(ENC))
        self.decoder = BlipTextLMHeadModel(self.towers.text.config)
        shared = self.towers.text
        self.decoder.bert.embeddings = shared.embeddings
        self.decoder.tie_weights()
        for mine, theirs in zip(self.decoder.bert.encoder.layer, shared.encoder.layer):
            mine.crossattention = theirs.crossattention
            mine.intermediate, mine.output = theirs.intermediate, theirs.output

    def _language(
        self, texts: Texts, keys: ImageKeys, twin_keys: ImageKeys, teacher: Teacher, alpha: Tensor, seed: int
    ) -> dict[str, Tensor]:
        told = texts.mask[:, 1:].bool()  # [R, T - 1], of the token before
        states = encode(self.decoder.bert, texts.starting_with(self.tokenizer.bos_token_id), keys, is_decoder=True)
        scores = self.decoder.cls(states[:, :-1][told])  # [C, V]
        true = texts.ids[:, 1:][told]
        return {"lm": mean_over_all(F.cross_entropy(scores, true, label_smoothing=SMOOTHING, reduction="none"))}

    @torch.no_grad()
    def caption(self, images: Tensor, *, prompt: str = "", **options: Any) -> list[str]:
        """A caption of each image [I, 3, H, W], without the prompt that they all begin with.

        An image's keys and values are projected once, for all words and all beams. In training mode dropout takes
        part.

        Args:
            prompt: BLIP's is "a picture of".
            options: of transformers' `generate`, as num_beams=3, or do_sample=True with top_p, top_k and temperature
                (torch's random state draws), repetition_penalty, min_new_tokens. max_new_tokens is 20 at most unless
                said.

        Raises:
            ValueError: where the model's positions end before max_new_tokens.
        """
        tokenizer = self.tokenizer
        begin = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        left = self.length - len(begin)
        count = options.setdefault("max_new_tokens", min(20, left))
        if not 1 <= count <= left:
            raise ValueError(f"caption: max_new_tokens must be in 1..{left} after this prompt, got {count}")
        ids = torch.tensor(begin, device=images.device).expand(len(images), -1)
        keys = ImageKeys(self.towers.images(images)[1])
        told = self.decoder.generate(ids, encoder_hidden_states=keys, **options)
        return tokenizer.batch_decode(told[:, len(begin) :], skip_special_tokens=True)


def _fitted(config: BlipTextConfig, visual: VisionTransformer, tokenizer: PreTrainedTokenizerBase) -> BlipTextConfig:
    """The config with the tokenizer's vocabulary and the images' width."""
    fitted = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "encoder_hidden_size": visual.conv1.out_channels,
    }
    return BlipTextConfig(**config.to_dict() | fitted)
