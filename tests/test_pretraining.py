"""ALBEF's and BLIP's parts: twins, the queue, hard negatives and the contrast of both directions."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastprob.ops._random import words
from fastprob.pretraining import ImageTextContrast, Queue, follow, hard_negatives, twin_of
from fastprob.pretraining.negatives import STREAM


def unit(*shape, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype), dim=-1)


def network():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


# ---------------------------------------------------------------------------------------------------- twins


def test_a_twin_follows(momentum=0.75):
    model = network()
    twin = twin_of(model)
    assert not twin.training and not any(p.requires_grad for p in twin.parameters())
    before = copy.deepcopy(twin.state_dict())
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model(torch.randn(7, 3))  # new running statistics
    follow(twin, model, momentum)
    for name, parameter in model.named_parameters():
        expected = momentum * before[name] + (1 - momentum) * parameter.detach()
        torch.testing.assert_close(twin.state_dict()[name], expected)
    assert twin[1].running_mean.equal(model[1].running_mean) and twin[1].running_mean.any()
    follow(twin, model, 0.0)
    assert all(a.equal(b) for a, b in zip(twin.parameters(), model.parameters()))
    start = network()
    slow = twin_of(start)
    for parameter in start.parameters():
        parameter.data += 1
    follow(slow, start)  # 0.995
    torch.testing.assert_close(slow[0].bias, start[0].bias - 0.995)


def test_a_twin_that_would_stand_still_is_refused():
    with pytest.raises(ValueError, match="model must have float32 or float64 parameters, got bfloat16"):
        twin_of(network().bfloat16())
    with pytest.raises(ValueError, match=r"momentum must be in 0\.\.1, got 1\.5"):
        follow(twin_of(network()), network(), 1.5)
    with pytest.raises(ValueError, match="model must have the twin's 6 parameters, got 2, or other shapes"):
        follow(twin_of(network()), nn.Linear(3, 5))


# ---------------------------------------------------------------------------------------------------- the queue


def test_the_queue_holds_the_last_pairs():
    """Batches that do not divide it, one larger than it, and an empty one."""
    queue, seen, size = Queue(7, 4), [], 7
    for number, count in enumerate((3, 5, 0, 17, 2, 7)):
        image, text = unit(count, 4, seed=number), unit(count, 4, seed=100 + number)
        ids = 10 * number + torch.arange(count)
        queue.add(image, text, ids)
        seen += zip(ids.tolist(), image, text)
        held = {int(i): (a, b) for i, a, b in zip(queue.ids, queue.image, queue.text) if i >= 0}
        assert set(held) == {i for i, _, _ in seen[-size:]}
        assert all(held[i][0].equal(a) and held[i][1].equal(b) for i, a, b in seen[-size:])
        assert queue.place == len(seen) % size


def test_an_empty_place_is_a_random_vector_without_an_id():
    queue, same, other = Queue(50, 8), Queue(50, 8), Queue(50, 8, seed=1)
    assert (queue.ids == -1).all() and queue.image.equal(same.image) and not queue.image.equal(other.image)
    torch.testing.assert_close(queue.text.norm(dim=1), torch.ones(50))
    assert not queue.image.equal(queue.text)


def test_a_queue_is_restored_with_its_place():
    queue, copied = Queue(5, 3), Queue(5, 3, seed=4)
    queue.add(unit(3, 3), unit(3, 3, seed=1), torch.arange(3))
    copied.load_state_dict(queue.state_dict())
    for each in (queue, copied):
        each.add(unit(4, 3, seed=2), unit(4, 3, seed=3), torch.arange(3, 7))
    assert all(a.equal(b) for a, b in zip(queue.state_dict().values(), copied.state_dict().values()))


def test_keys_are_the_batch_and_then_the_queue():
    queue = Queue(4, 3)
    queue.add(unit(2, 3), unit(2, 3, seed=1), torch.tensor([8, 9]))
    features = unit(3, 3, seed=2, dtype=torch.float64)
    keys, ids = queue.keys("text", features, torch.tensor([1, 1, 2]))
    assert keys.dtype == torch.float64 and keys.equal(torch.cat([features, queue.text.double()]))
    assert ids.tolist() == [1, 1, 2, 8, 9, -1, -1]
    assert queue.keys("image", features, ids[:3])[0][3:].equal(queue.image.double())


@pytest.mark.parametrize("change", [{"image": (2, 3)}, {"text": (3, 4)}, {"ids": (3,)}, {"image": (4,)}])
def test_bad_pairs_are_named(change):
    shapes = {"image": (2, 4), "text": (2, 4), "ids": (2,)} | change
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"Queue: image, text and ids must be \[B, 4\], \[B, 4\] and \[B\], got"):
        Queue(5, 4).add(**tensors)
    with pytest.raises(ValueError, match="Queue: size must be at least 1, got 0"):
        Queue(0, 4)


# ------------------------------------------------------------------------------------------------ hard negatives


def test_negatives_are_gumbels_maximum():
    similarities, ids = 3 * torch.randn(9, 14), torch.arange(14) // 2
    which, found = hard_negatives(similarities, ids[:9], ids, seed=5)
    numbers = torch.stack(words(torch.arange(32), seed=5, stream=STREAM), 1).flatten()[: 9 * 14].view(9, 14)
    u = (numbers.double() + 0.5) / 2**32
    chances = similarities.double() - torch.log(-torch.log(u))
    chances[ids[:9, None] == ids] = -torch.inf
    assert which.equal(chances.argmax(1)) and found.all()
    assert not which.equal(hard_negatives(similarities, ids[:9], ids, seed=6)[0])


def test_negatives_come_as_often_as_the_softmax_says():
    similarities, ids = torch.tensor([[1.0, 0.0, 5.0, 2.0, -1.0]]).expand(20_000, -1), torch.tensor([0, 1, 2, 3, 4])
    which, _ = hard_negatives(similarities, torch.full((20_000,), 2), ids, seed=1)  # the greatest is its own
    shares = which.bincount(minlength=5) / 20_000
    expected = similarities[0].masked_fill(ids == 2, -torch.inf).softmax(0)
    assert shares[2] == 0
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.015)  # four deviations


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_edges_that_multinomial_stops_at(dtype):
    """One pair; all of one image; similarities so far apart that every chance but one is 0; NaN and 0."""
    one = torch.ones(1, 1, dtype=dtype)
    assert hard_negatives(one, torch.tensor([3]), torch.tensor([3]), seed=0)[1].tolist() == [False]
    alike = torch.zeros(3, dtype=torch.int64)
    assert not hard_negatives(torch.ones(3, 3, dtype=dtype), alike, alike, seed=0)[1].any()
    far = torch.tensor([[6e4, -6e4, -6e4], [-6e4, 6e4, -6e4]], dtype=dtype)
    which, found = hard_negatives(far, torch.tensor([0, 1]), torch.arange(3), seed=0)
    assert found.all() and which[0] != 0 and which[1] != 1
    for nothing in (torch.nan, -torch.inf):
        which, found = hard_negatives(torch.full_like(far, nothing), torch.tensor([0, 1]), torch.arange(3), seed=0)
        assert found.all() and which[0] != 0 and which[1] != 1
    assert hard_negatives(far[:0], alike[:0], alike, seed=0)[0].shape == (0,)


def test_bad_similarities_are_named():
    ids = torch.arange(3)
    with pytest.raises(ValueError, match=r"similarities must be \[B, N\] with N at least 1, got \[3, 0\]"):
        hard_negatives(torch.ones(3, 0), ids, ids[:0], seed=0)
    with pytest.raises(ValueError, match=r"query_ids must be \[2\], got \[3\]"):
        hard_negatives(torch.ones(2, 3), ids, ids, seed=0)
    with pytest.raises(ValueError, match=r"hard_negatives: ids must be \[4\], got \[3\]"):
        hard_negatives(torch.ones(3, 4), ids, ids, seed=0)


# -------------------------------------------------------------------------------------------------- the contrast


def test_contrast_is_albefs():
    """Its released lines, both directions; the queue is left as it was."""
    count, alpha, contrast, queue = 5, torch.tensor(0.3), ImageTextContrast(), Queue(11, 6)
    queue.add(unit(4, 6, seed=8), unit(4, 6, seed=9), torch.tensor([0, 7, 2, 2]))
    image, text = (unit(count, 6, seed=seed).requires_grad_() for seed in (1, 2))
    image_m, text_m = unit(count, 6, seed=3), unit(count, 6, seed=4)
    ids = torch.tensor([0, 1, 1, 2, 3])
    before = copy.deepcopy(queue.state_dict())
    loss = contrast(image, text, (image_m, text_m), ids, queue, alpha)
    assert all(a.equal(b) for a, b in zip(before.values(), queue.state_dict().values()))

    temp = torch.tensor(0.07, requires_grad=True)
    image_all, text_all = torch.cat([image_m, queue.image]), torch.cat([text_m, queue.text])
    positives = torch.eq(ids.view(-1, 1), torch.cat([ids, queue.ids]).view(1, -1)).float()
    sim_targets = positives / positives.sum(1, keepdim=True)
    with torch.no_grad():
        sim_i2t_m, sim_t2i_m = image_m @ text_all.t() / temp, text_m @ image_all.t() / temp
        sim_i2t_targets = alpha * F.softmax(sim_i2t_m, dim=1) + (1 - alpha) * sim_targets
        sim_t2i_targets = alpha * F.softmax(sim_t2i_m, dim=1) + (1 - alpha) * sim_targets
    sim_i2t, sim_t2i = image @ text_all.t() / temp, text @ image_all.t() / temp
    loss_i2t = -torch.sum(F.log_softmax(sim_i2t, dim=1) * sim_i2t_targets, dim=1).mean()
    loss_t2i = -torch.sum(F.log_softmax(sim_t2i, dim=1) * sim_t2i_targets, dim=1).mean()
    expected = (loss_i2t + loss_t2i) / 2
    torch.testing.assert_close(loss, expected)
    actual = torch.autograd.grad(loss, (image, text, contrast.temperature))
    torch.testing.assert_close(actual, torch.autograd.grad(expected, (image, text, temp)), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("value", "kept"), [(3.0, 0.5), (1e-6, 0.001), (0.2, 0.2)])
def test_temperature_is_kept_in_range(value, kept):
    contrast, queue, rows = ImageTextContrast(), Queue(3, 4), unit(2, 4)
    contrast.temperature.data.fill_(value)
    assert contrast(rows, rows, (rows, rows), torch.arange(2), queue, torch.tensor(0.0)).isfinite()
    torch.testing.assert_close(contrast.temperature.detach(), torch.tensor(kept))
    with pytest.raises(ValueError, match=r"temperature must be in 0\.001\.\.0\.5, got 0\.7"):
        ImageTextContrast(0.7)


def test_contrast_under_autocast():
    """Half features of both models, a queue of float32."""
    contrast, queue, rows = ImageTextContrast(), Queue(30, 8), unit(4, 8)
    half = rows.bfloat16()
    wide = half.float()
    expected = contrast(wide, wide, (wide, wide), torch.arange(4), queue, torch.tensor(0.4))
    torch.testing.assert_close(contrast(half, half, (half, half), torch.arange(4), queue, torch.tensor(0.4)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = contrast(half, half, (half, half), torch.arange(4), queue, torch.tensor(0.4))
    torch.testing.assert_close(actual, expected)
    wide = rows.double()
    assert contrast(wide, wide, (wide, wide), torch.arange(4), queue, torch.tensor(0.4)).dtype == torch.float64


def test_learning_pulls_pairs_together():
    """A linear model of each side with its twin: after some steps a pair is nearer to itself than to any other."""
    torch.manual_seed(3)
    hidden = torch.randn(40, 12)
    image, text = hidden @ torch.randn(12, 20), hidden @ torch.randn(12, 16)
    model = nn.ModuleList([nn.Linear(20, 8), nn.Linear(16, 8)])
    twin, contrast, queue = twin_of(model), ImageTextContrast(), Queue(64, 8)
    adam = torch.optim.Adam([*model.parameters(), *contrast.parameters()], 0.02)
    of = lambda encoders, rows: [F.normalize(encoder(x[rows]), dim=1) for encoder, x in zip(encoders, (image, text))]  # noqa: E731
    for step in range(60):
        rows = torch.randperm(40)[:16]
        follow(twin, model, 0.9)
        features, momentum = of(model, rows), of(twin, rows)
        loss = contrast(*features, tuple(momentum), rows, queue, torch.tensor(0.4 * min(step / 30, 1)))
        adam.zero_grad()
        loss.backward()
        adam.step()
        queue.add(*momentum, rows)
    a, b = of(model, torch.arange(40))
    assert ((a @ b.T).argmax(1) == torch.arange(40)).double().mean() > 0.9
