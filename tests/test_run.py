"""A training run: what it keeps beside the model, and how several ranks take part in it."""

import math

import pytest
import torch
import torch.multiprocessing
from torch import nn

from fastprob import training
from fastprob.adapters import PairedEmbeddings, TrainConfig, fit
from fastprob.training import Run, distributed


class Contrast(Run):
    """Fits a linear layer to its own moving average, with a queue of its last outputs."""

    def __init__(self, directory=None):
        training.seed_all(0, torch.device("cpu"))
        model = nn.Linear(3, 2)
        self.average = nn.Linear(3, 2).requires_grad_(False)
        self.queue = nn.Module()
        self.queue.register_buffer("rows", torch.zeros(4, 2))
        super().__init__(
            format="test/1",
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            rate=lambda step: 1.0,
            epochs=3,
            steps=2,
            directory=directory,
            extras={"average": self.average, "queue": self.queue},
        )

    def identity(self):
        return {}

    def batches(self):
        rows = torch.randn(self.steps, 5, 3, generator=torch.Generator().manual_seed(self.epoch))
        return ((batch,) for batch in rows[self.step :])

    def loss(self, x):
        return (self.model(x) - self.average(x) - self.queue.rows.mean(0)).square().mean()

    def update(self, x):
        loss = super().update(x)
        with torch.no_grad():
            for ours, theirs in zip(self.average.parameters(), self.model.parameters()):
                ours.lerp_(theirs, 0.5)
            self.queue.rows = torch.cat([self.model(x), self.queue.rows])[:4]
        return loss


def run(directory=None, resume=False, run_class=Contrast):
    taken = run_class(directory)
    taken.train(resume=resume, progress=False)
    return taken


class Stopped(Contrast):
    def epoch_ended(self, train_loss):
        if self.epoch == 2:
            raise RuntimeError("power cut")


def test_moving_average_and_queue_are_restored_with_the_run(tmp_path):
    expected = run()
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, run_class=Stopped)
    state = torch.load(tmp_path / training.LAST, weights_only=True)
    assert state["epoch"] == 1 and sorted(state["extras"]) == ["average", "queue"]
    resumed = run(tmp_path, resume=True)
    assert resumed.history == expected.history
    for ours, theirs in ((resumed.average, expected.average), (resumed.queue, expected.queue)):
        assert all(weight.equal(theirs.state_dict()[name]) for name, weight in ours.state_dict().items())
    assert expected.queue.rows.abs().min() > 0


@pytest.mark.parametrize(("rows", "count"), [(8, 2), (7, 2), (7, 3), (2, 3), (1, 4)])
def test_shares_are_of_one_size_and_together_the_batch(monkeypatch, rows, count):
    monkeypatch.setattr(distributed, "ranks", lambda: count)
    shares = []
    for rank in range(count):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.share(torch.arange(10, 10 + rows)).tolist())
    assert {len(share) for share in shares} == {math.ceil(rows / count)}
    assert {row for share in shares for row in share} == set(range(10, 10 + rows))


def pairs():
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(24).repeat(2)
    return PairedEmbeddings(torch.randn(24, 6, generator=generator), torch.randn(48, 6, generator=generator), owner)


def fitted(directory):
    config = TrainConfig(epochs=2, batch_size=4, hidden=8, dropout=0.0)
    result = fit(pairs(), config=config, directory=directory, device="cpu", progress=False)
    return {"history": result.history, "weights": result.model.state_dict()}


def fit_on_rank(rank, directory):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{directory}/meeting", rank=rank, world_size=2)
    torch.save(fitted(directory / f"rank{rank}"), directory / f"result{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_train_as_one_process_does_and_one_of_them_writes(tmp_path):
    alone = fitted(tmp_path / "alone")
    torch.multiprocessing.spawn(fit_on_rank, (tmp_path,), nprocs=2)
    results = [torch.load(tmp_path / f"result{rank}.pt", weights_only=True) for rank in range(2)]
    assert results[0]["history"] == results[1]["history"]
    assert results[0]["history"]["step_loss"] == pytest.approx(alone["history"]["step_loss"], rel=1e-5)
    for name, weight in alone["weights"].items():
        assert results[0]["weights"][name].equal(results[1]["weights"][name])
        torch.testing.assert_close(results[0]["weights"][name], weight, rtol=1e-3, atol=1e-5)
    assert sorted(file.name for file in (tmp_path / "rank0").iterdir()) == sorted(
        file.name for file in (tmp_path / "alone").iterdir()
    )
    assert not (tmp_path / "rank1").exists()
