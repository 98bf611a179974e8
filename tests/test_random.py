"""Random numbers by counter: known answers."""

import math

import pytest
import torch

from fastprob.ops import _random

stats = pytest.importorskip("scipy.stats")


def test_known_answers():
    group = torch.zeros(1, dtype=torch.int64)
    answers = {0: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), 42: (2632642643, 2012563771, 314527917, 1463989207)}
    for seed, expected in answers.items():
        assert tuple(int(w) for w in _random.words(group, seed=seed, stream=0)) == expected


def test_every_part_of_counter_and_key_counts():
    """The generator's published vectors for counters and keys of all ones and of pi's digits."""
    group = torch.tensor([-1, 0x85A308D3243F6A88 - 2**64])
    ones = _random.words(group[:1], seed=-1, stream=2**32 - 1, draw=2**32 - 1)
    assert [int(w) for w in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = _random.words(group[1:], seed=0x299F31D0A4093822, stream=0x13198A2E, draw=0x03707344)
    assert [int(w) for w in pi] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.75])
def test_dropout_keeps_its_share(p):
    kept = _random.kept(100, 1003, p=p, seed=3, device="cpu")
    assert kept.shape == (100, 1003)
    assert abs(kept.double().mean() - (1 - p)) < 0.005
    assert kept.flatten()[:7].tolist() == _random.kept(1, 7, p=p, seed=3, device="cpu").flatten().tolist()


def test_normal_numbers():
    """The first ones by hand, from the words of `test_known_answers`; their distribution; none tells of another."""
    first = _random.normals(3, seed=42, stream=0, dtype=torch.float64, device="cpu")
    radii = [(-2 * math.log(((w >> 8) + 1) / 2**24)) ** 0.5 for w in (2632642643, 314527917)]
    angles = [2 * math.pi * w / 2**32 for w in (2012563771, 1463989207)]
    expected = [radii[0] * math.cos(angles[0]), radii[0] * math.sin(angles[0]), radii[1] * math.cos(angles[1])]
    torch.testing.assert_close(first.tolist(), expected, rtol=1e-14, atol=0)
    n = 200_000
    draws = [_random.normals(n, seed=7, stream=9, draw=d, dtype=torch.float64, device="cpu") for d in (0, 1)]
    for x in draws:
        assert stats.kstest(x.numpy(), stats.norm.cdf).pvalue > 0.01
    x, y = draws
    for a, b in [(x, y), *((x[k:], x[:-k]) for k in (1, 2, 3, 4))]:
        for of in (lambda v: v, torch.square):
            assert abs(torch.corrcoef(torch.stack([of(a), of(b)]))[0, 1]) < 4 / n**0.5
