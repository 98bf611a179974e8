"""Decoding by a tiny pipeline with random weights, built and saved by diffusers itself and loaded as users do."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import fastprob.cli as cli
from fastprob.adapters import ProbVLM, draws
from fastprob.adapters.diffusion import Decoder
from fastprob.adapters.draws import Draws, decoded
from fastprob.data.digitscenes import DigitScenes
from fastprob.data.store import embed
from fastprob.encoders import load_encoder

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 16
COUNT = 12  # scenes


class OfPipeline:
    """The pipeline's image encoder, as `embed` takes encoders; texts are those of fastprob's tiny one, cut to DIM."""

    name, pretrained, dim = "tiny-unclip", None, DIM

    def __init__(self, pipeline):
        self.pipeline, self.tiny = pipeline, load_encoder("tiny")
        self.tokenizer, self.encode_text = self.tiny.tokenizer, self._encode_text

    def preprocess(self, picture):
        return self.pipeline.feature_extractor(images=picture, return_tensors="pt").pixel_values[0]

    @torch.no_grad()
    def encode_image(self, batch):
        return normalize(self.pipeline.image_encoder(batch).image_embeds, dim=1)

    def _encode_text(self, tokens):
        return normalize(self.tiny.encode_text(tokens)[:, :DIM], dim=1)

    def fingerprint(self):
        return "0"


@pytest.fixture(scope="module")
def scenes():
    return DigitScenes("test", num_scenes=COUNT)


@pytest.fixture(scope="module")
def pipeline(scenes):
    """All embeddings of its encoder have one norm, and its normalizer knows those of the scenes."""
    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}
    of_text = transformers.CLIPTextConfig(
        **small, vocab_size=4, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    of_images = transformers.CLIPVisionConfig(
        **small, initializer_factor=20.0, image_size=32, patch_size=8, projection_dim=DIM
    )
    encoder = transformers.CLIPVisionModelWithProjection(of_images)
    torch.nn.init.orthogonal_(encoder.visual_projection.weight)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    unet = diffusers.UNet2DConditionModel(
        **blocks,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=8,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * DIM,
    )
    vae = diffusers.AutoencoderKL(
        **blocks, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    size = {"height": 32, "width": 32}
    pipeline = diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=transformers.CLIPImageProcessor(size=size, crop_size=size),
        image_encoder=encoder.eval(),
        image_normalizer=diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(DIM),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8),
        text_encoder=transformers.CLIPTextModel(of_text),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        vae=vae,
    )
    with torch.no_grad():
        for linear in (unet.class_embedding.linear_1, unet.class_embedding.linear_2):
            linear.weight.mul_(4)  # with its first weights the pictures hardly depend on the embedding
        embeddings = embeddings_of(pipeline, [scenes[i][0] for i in range(COUNT)])
        pipeline.image_normalizer.mean.copy_(embeddings.mean(0, keepdim=True))
        pipeline.image_normalizer.std.copy_(embeddings.std(0, correction=0, keepdim=True))
    return pipeline


@torch.no_grad()
def embeddings_of(pipeline, pictures):
    """[N, D], as the pipeline has them."""
    pixels = pipeline.feature_extractor(images=pictures, return_tensors="pt").pixel_values
    return pipeline.image_encoder(pixels).image_embeds


@pytest.fixture(scope="module")
def saved(tmp_path_factory, pipeline):
    path = tmp_path_factory.mktemp("pipeline") / "unclip"
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def decoder(saved):
    return Decoder(saved, dim=DIM)


@pytest.fixture(scope="module")
def files(tmp_path_factory, pipeline, scenes):
    """A store of scenes by the pipeline's encoder, and an adapter."""
    directory = tmp_path_factory.mktemp("files")
    embed(scenes, OfPipeline(pipeline), directory / "store", progress=False)
    torch.manual_seed(0)
    ProbVLM(DIM, hidden=8).save(directory / "model.safetensors")
    return directory


def pixels(picture):
    return np.asarray(picture).astype(int)


def test_a_unit_embedding_is_decoded_as_the_encoder_would_have_it(pipeline, decoder, scenes):
    picture = scenes[3][0]
    embedding = embeddings_of(pipeline, picture)
    assert decoder.norm == pytest.approx(float(embedding.norm()), rel=1e-5)
    expected = pipeline(picture, generator=torch.Generator().manual_seed(4)).images[0]
    other = pipeline(scenes[4][0], generator=torch.Generator().manual_seed(4)).images[0]
    found, again, noise = (decoder(normalize(embedding, dim=1), seed=seed, progress=False)[0] for seed in (4, 4, 5))
    assert np.abs(pixels(found) - pixels(expected)).max() <= 1
    assert np.abs(pixels(other) - pixels(expected)).max() > 1  # the pipeline tells the embeddings apart
    assert (pixels(found) == pixels(again)).all() and (pixels(found) != pixels(noise)).any()


def test_all_start_from_the_same_noise(decoder):
    rows = normalize(torch.randn(3, DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    first, second, third = decoder(rows[[0, 1, 0]], progress=False)
    assert (pixels(first) == pixels(third)).all() and (pixels(first) != pixels(second)).any()


def test_the_mean_and_the_first_draws_are_decoded(decoder, monkeypatch):
    monkeypatch.setattr(draws, "SHOWN", 2)
    rows = normalize(torch.randn(4, DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    tiles = decoded(Draws(rows[0], rows[1:], 0, [0, 0, 0]), decoder, seed=8, progress=False)
    assert [below for _, below in tiles] == ["mean", "draw 1", "draw 2"]
    for (shown, _), expected in zip(tiles, decoder(rows, seed=8, progress=False)):
        assert (pixels(shown) == pixels(expected)).all()


def test_its_encoder_must_be_theirs(pipeline, decoder, scenes):
    embedding = normalize(embeddings_of(pipeline, scenes[0][0])[0], dim=0)
    decoder.check(scenes[0][0], embedding)
    for other in (-embedding, torch.full((DIM,), torch.nan)):
        with pytest.raises(ValueError, match=r"must belong to the encoder of the embeddings: .* of cosine"):
            decoder.check(scenes[0][0], other)


def test_other_widths_and_pipelines(tmp_path, pipeline, saved):
    with pytest.raises(ValueError, match="takes embeddings of width 16, these have 24"):
        Decoder(saved, dim=24)
    diffusers.DDIMPipeline(
        diffusers.UNet2DModel(
            8,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
        ),
        pipeline.scheduler,
    ).save_pretrained(tmp_path / "ddim")
    with pytest.raises(ValueError, match="must be a StableUnCLIPImg2ImgPipeline, got a DDIMPipeline"):
        Decoder(tmp_path / "ddim", dim=DIM)
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        Decoder(tmp_path, dim=DIM)


def test_pickled_weights_are_not_loaded(tmp_path, pipeline):
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        Decoder(tmp_path, dim=DIM)


@pytest.mark.parametrize("data", [True, False])
def test_draw_decodes(capsys, tmp_path, saved, files, data):
    out = tmp_path / "grid.png"
    argv = ["draw", "image:2", "--store", files / "store", "--checkpoint", files / "model.safetensors", "--draws", 1]
    argv += ["--diffusion", saved, "--out", out, "--device", "cpu"]
    argv += ["--data", "digitscenes:test", "--limit", COUNT] if data else []
    assert cli.main([str(word) for word in argv]) == 0
    assert "1 draws, 1 nearest image" in (output := capsys.readouterr().out) and f"Written to {out}" in output
    width, height = Image.open(out).size
    assert 3 * 200 < width < 4 * 300 and height < 2 * 250  # the query, the mean and the draw


def test_draw_refuses_another_space(capsys, tmp_path, saved, scenes, files):
    """The width agrees, the encoder is another."""
    encoder = OfPipeline(diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(saved))
    encoder.pipeline.image_encoder.visual_projection.weight.data.neg_()
    embed(scenes, encoder, tmp_path / "store", progress=False)
    argv = ["draw", "image:2", "--store", tmp_path / "store", "--checkpoint", files / "model.safetensors"]
    argv += ["--diffusion", saved, "--out", tmp_path / "grid.png", "--device", "cpu"]
    argv += ["--data", "digitscenes:test", "--limit", COUNT]
    assert cli.main([str(word) for word in argv]) == 2
    assert "must belong to the encoder of the embeddings" in capsys.readouterr().err
