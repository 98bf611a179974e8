"""What the similarities of frozen embeddings tell of a query's first match, without any training.

With s_qg the cosine of query q and gallery item g, Z_q = sum_g exp(s_qg / T) over the G items and Z_g = sum_q
exp(s_qg / T) over the Q queries, and the first items of q by similarity s_1 >= s_2 >= ... (t the first one):

    distance         1 - s_1
    margin_k         s_k - s_1, k = 2, 5, 10
    mean, deviation  mean and standard deviation of s_q.;   z   (mean - s_1) / deviation
    entropy_T        entropy of softmax(s_q. / T), divided by log G
    doubt_T          -log softmax(s_q. / T)_t, relative to log G
    reverse_T        -log softmax(s_.t / T)_q, relative to log Q: does the item ask for the query, too?
    mutual_T         the least, over the first ten items g, of -log softmax(s_q. / T)_g softmax(s_.g / T)_q
    hubness          how many queries have t first, as the log of its ratio to their mean Q / G
    rival            max_q' s_q't - s_1: by how much t is closer to another query;   best   max_q' s_q't
    popularity       mean of s_.t
    gallery          log G

Larger is not always less certain: a score must be fitted (`fastprob.evaluation.error`), but distance, entropy and the
margins are scores as they stand. The temperatures T are `FACTORS` times the one asked for. Sources: hubness from
Radovanovic et al., JMLR 2010; both softmaxes from Cheng et al., Video-Text Retrieval by Dual Softmax Loss, 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastprob.data.pairs import Paired
from fastprob.evaluation.retrieval import products

FACTORS = (0.4, 1.0, 2.5)
TEMPERATURES = tuple(round(0.005 * 1.5**i, 5) for i in range(12))  # 0.005 to 0.43; open_clip's models learn 0.01
FIRST = 10  # items of a query that are looked at


class _Softmax:
    """log of the sum of exp(s / T) and the entropy of the softmax, of rows that come block by block."""

    def __init__(self, count: int, temperature: float):
        self.temperature = temperature
        self.top = torch.full((count,), -math.inf)
        self.mass, self.moment = torch.zeros(count), torch.zeros(count)

    def add(self, which: Tensor, similarity: Tensor, along: int) -> None:
        top = torch.maximum(self.top[which], similarity.amax(along))
        weight = ((similarity - top.unsqueeze(along)) / self.temperature).exp_()
        kept = ((self.top[which] - top) / self.temperature).exp_()
        self.mass[which] = self.mass[which] * kept + weight.sum(along)
        self.moment[which] = self.moment[which] * kept + (weight * similarity).sum(along)
        self.top[which] = top

    @property
    def log_sum(self) -> Tensor:
        return self.top / self.temperature + self.mass.log()

    @property
    def entropy(self) -> Tensor:
        return self.log_sum - self.moment / (self.mass * self.temperature)


class _Side:
    """What is gathered of the rows of one side, over all blocks."""

    def __init__(self, count: int, others: int, temperatures: list[float]):
        self.first = torch.full((count, min(FIRST, others)), -math.inf)  # similarities, the greatest first
        self.item = torch.zeros(self.first.shape, dtype=torch.int64)  # whose they are
        self.sum, self.squares = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        self.softmax = [_Softmax(count, temperature) for temperature in temperatures]
        self.others = others

    def add(self, which: Tensor, items: Tensor, similarity: Tensor, along: int) -> None:
        rows = similarity if along else similarity.T  # [B, C]
        values, at = rows.topk(min(self.first.shape[1], rows.shape[1]), 1)
        values, items = torch.cat([self.first[which], values], 1), torch.cat([self.item[which], items[at]], 1)
        self.first[which], order = values.topk(self.first.shape[1], 1)
        self.item[which] = items.gather(1, order)
        self.sum[which] += similarity.sum(along).double()
        self.squares[which] += similarity.square().sum(along).double()
        for softmax in self.softmax:
            softmax.add(which, similarity, along)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.others

    @property
    def deviation(self) -> Tensor:
        return (self.squares / self.others - self.mean**2).clamp(min=0).sqrt()


@dataclass(frozen=True)
class Signals:
    """Of Q queries: the signals by name, [Q] float64, and their first items, [Q, 10] rows of the gallery."""

    values: dict[str, Tensor]
    items: Tensor

    def rows(self, which: Tensor) -> Signals:
        """Of the queries `which`, [R] rows."""
        return Signals({name: value[which] for name, value in self.values.items()}, self.items[which])


def signals(query: Tensor, gallery: Tensor, temperature: float) -> tuple[Signals, Signals]:
    """Signals of the queries, and of the gallery items as queries.

    Args:
        query, gallery: frozen embeddings [Q, D] and [G, D]; they may be memory-mapped.
        temperature: T > 0 of the softmax, such as `fit_temperature` finds.
    """
    sides = [
        _Side(len(rows), len(others), [factor * temperature for factor in FACTORS])
        for rows, others in ((query, gallery), (gallery, query))
    ]
    for similarity, (rows, columns) in products(query, gallery, "signals"):
        similarity = similarity.cpu()
        sides[0].add(rows, columns, similarity, 1)
        sides[1].add(columns, rows, similarity, 0)
    return _signals(*sides), _signals(*reversed(sides))


def fit_temperature(data: Paired) -> float:
    """The temperature, of `TEMPERATURES`, at which `own_doubt` is least on average: the greatest likelihood."""
    return TEMPERATURES[int(torch.stack([doubt.mean() for doubt in _own_doubts(data, TEMPERATURES)]).argmin())]


def own_doubt(data: Paired, temperature: float) -> Tensor:
    """How little each text and the image that it is said to belong to ask for each other, [M] float32, in nats:

        -log softmax(s_t. / T)_own - log softmax(s_.own / T)_t        softmax over the images and over the texts

    Large where another image is closer to the text, or another text to its image. temperature: T > 0.
    """
    return _own_doubts(data, (temperature,))[0]


def _own_doubts(data: Paired, temperatures: Sequence[float]) -> list[Tensor]:
    """`own_doubt` at each temperature."""
    of_text = [_Softmax(len(data.text), temperature) for temperature in temperatures]
    of_image = [_Softmax(len(data.image), temperature) for temperature in temperatures]
    own = torch.zeros(len(data.text))
    for similarity, (texts, images) in products(data.text, data.image, "own pairs"):
        similarity = similarity.cpu()
        for each, other in zip(of_text, of_image):
            each.add(texts, similarity, 1)
            other.add(images, similarity, 0)
        at = data.caption_image[texts] - images[0]
        here = (at >= 0) & (at < len(images))
        own[texts[here]] = similarity[here, at[here]]
    return [
        each.log_sum + other.log_sum[data.caption_image] - 2 * own / each.temperature
        for each, other in zip(of_text, of_image)
    ]


def _signals(side: _Side, other: _Side) -> Signals:
    first, item, top = side.first.double(), side.item, side.item[:, 0]
    best = first[:, 0]
    count = torch.bincount(top, minlength=side.others).double()
    result = {"distance": 1 - best}
    for k in (2, 5, FIRST):
        result[f"margin_{k}"] = first[:, min(k, first.shape[1]) - 1] - best
    result |= {"mean": side.mean, "deviation": side.deviation}
    result["z"] = (side.mean - best) / side.deviation.clamp(min=1e-9)
    for factor, own, its in zip(FACTORS, side.softmax, other.softmax):
        doubt = own.log_sum.double()[:, None] - first / own.temperature - math.log(side.others)  # [Q, k]
        reverse = its.log_sum.double()[item] - first / own.temperature - math.log(other.others)
        result[f"entropy_{factor:g}"] = own.entropy.double() / max(math.log(side.others), 1e-9)
        result[f"doubt_{factor:g}"], result[f"reverse_{factor:g}"] = doubt[:, 0], reverse[:, 0]
        result[f"mutual_{factor:g}"] = (doubt + reverse).amin(1)
    result["hubness"] = (count[top] * side.others / other.others).log()
    closest = other.first[:, 0].double()[top]
    result |= {"rival": closest - best, "best": closest, "popularity": other.mean[top]}
    result["gallery"] = torch.full_like(best, math.log(side.others))
    return Signals(result, item)
