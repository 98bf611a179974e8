"""Test-time augmentation on pictures whose embeddings are known."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from fastprob.encoders import load_encoder
from fastprob.encoders.augmentation import augmented_variance


class Halves:
    """Embeds a picture by the brightness of its left and of its right half."""

    @staticmethod
    def preprocess(picture):
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()

    @staticmethod
    def encode_image(batch):
        left, right = batch.chunk(2, dim=3)
        return normalize(torch.stack([left.mean((1, 2, 3)), right.mean((1, 2, 3))], 1), dim=1)


def picture(left, right, height=6, width=8):
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = left, right
    return Image.fromarray(pixels)


DATA = [(picture(200, 200), []), (picture(200, 0), []), (picture(0, 90), [])]


def test_flips_alone_are_a_coin():
    """The embedding is one unit vector or the other: the variance of each coordinate is k/n (1 - k/n)."""
    found = augmented_variance(Halves, DATA, views=10, least=1)
    possible = [k / 10 * (1 - k / 10) for k in range(11)]
    assert found[0] == 0
    for value in found[1:].tolist():
        assert min(abs(value - each) for each in possible) < 1e-6 and value > 0.05
    assert augmented_variance(Halves, DATA, views=10, least=1, flip=False).tolist() == [0, 0, 0]
    many = augmented_variance(Halves, DATA[1:2], views=2000, least=1)
    assert float(many) == pytest.approx(0.25, abs=0.01)


def test_crops_move_what_is_off_the_middle():
    found = augmented_variance(Halves, DATA, views=20, least=0.5, flip=False)
    assert found[0] < 1e-6 and found[1] > 1e-3


def test_views_depend_on_seed_and_place_alone():
    torch.manual_seed(7)
    one = augmented_variance(Halves, DATA, seed=3)
    state = torch.random.get_rng_state()
    torch.manual_seed(8)
    assert one.equal(augmented_variance(Halves, DATA, seed=3))
    assert one[:2].equal(augmented_variance(Halves, DATA[:2], seed=3))
    assert not one.equal(augmented_variance(Halves, DATA, seed=4))
    twice = augmented_variance(Halves, DATA[1:2] * 2, least=0.5)
    assert twice[0] != twice[1]
    torch.manual_seed(7)
    assert state.equal(torch.random.get_rng_state())


def test_an_encoder_of_ours_takes_pictures_as_they_are():
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    found = augmented_variance(load_encoder("tiny"), [(Image.fromarray(noise), ["noise"])], views=3)
    assert found.shape == (1,) and found > 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [({"views": 1}, "views must be at least 2, got 1"), ({"least": 0}, r"least must be in \(0, 1\], got 0")],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"augmented_variance: {message}"):
        augmented_variance(Halves, DATA, **options)
