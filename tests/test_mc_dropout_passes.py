"""Monte-Carlo dropout of any module, against a loop over passes with masks written out."""

import copy
import threading

import pytest
import torch
from torch import nn

import fastprob
from fastprob.adapters import GGDAdapter
from fastprob.ops._random import kept

PASSES, SEED = 9, 11


def mask(units, p, stream, passes=PASSES):
    """[passes, units]: what a pass multiplies a unit by."""
    return kept(passes, units, p=p, seed=SEED, device="cpu", stream=stream).double() / (1 - p)


def statistics(outputs):
    return outputs.mean(0), outputs.var(0, correction=0)


class Net(nn.Module):
    """Two dropouts, whole channels among them; a batch norm; a nested output."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)
        self.channels, self.units = nn.Dropout1d(0.4), nn.Dropout(0.25, inplace=True)
        self.last = nn.Linear(20, 5)

    def forward(self, x, shift):
        h = self.channels(torch.relu(self.norm(self.conv(x)))).flatten(1)  # [N, 20]
        y = self.last(torch.relu_(self.units(h)))
        return {"y": y + shift, "both": (y.square(), [h.view(-1, 4, 5)]), "nothing": None}


def net_loop(net, x, shift):
    """The outputs of every pass, [passes, N, ...] each."""
    first, second = mask(4, 0.4, 0), mask(20, 0.25, 1)
    results = []
    for m in range(PASSES):
        h = (torch.relu(net.norm(net.conv(x))) * first[m, :, None]).flatten(1) * second[m]
        y = net.last(torch.relu(h))
        results.append((y + shift, y.square(), h.view(-1, 4, 5)))
    return [torch.stack(each) for each in zip(*results)]


def problem(rows=10):
    net = Net().double()
    net.norm.running_mean.uniform_(-1, 1)
    return net, torch.randn(rows, 3, 7, dtype=torch.float64), torch.randn(rows, 1, dtype=torch.float64)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 25, 1024])
def test_as_a_loop_over_passes_with_explicit_masks(batch_size):
    """Whatever the batch size, to the rounding of sums."""
    net, *x = problem()
    mean, variance = fastprob.mc_dropout_passes(net, tuple(x), passes=PASSES, seed=SEED, batch_size=batch_size)
    expected = [statistics(outputs) for outputs in net_loop(net.eval(), *x)]
    for result, of in (mean, 0), (variance, 1):
        assert set(result) == {"y", "both", "nothing"} and result["nothing"] is None
        actual = result["y"], result["both"][0], result["both"][1][0]
        torch.testing.assert_close(actual, tuple(e[of] for e in expected), rtol=1e-12, atol=1e-12)
    assert variance["y"].min() > 1e-6 and not mean["y"].requires_grad


def test_rows_do_not_depend_on_other_rows():
    net, *x = problem()
    _, whole = fastprob.mc_dropout_passes(net, tuple(x), passes=PASSES)
    _, some = fastprob.mc_dropout_passes(net, tuple(t[[7, 2]] for t in x), passes=PASSES)
    torch.testing.assert_close(some["y"], whole["y"][[7, 2]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("units", [1, 3, 8])
def test_masks_of_some_passes_are_those_of_all(units):
    whole = kept(20, units, p=0.5, seed=3, device="cpu", stream=2)
    for first, count in (0, 20), (1, 1), (3, 7), (19, 1), (5, 0):
        some = kept(count, units, p=0.5, seed=3, device="cpu", stream=2, first=first)
        assert some.equal(whole[first : first + count])


def test_seeds_and_streams():
    net, *x = problem()
    variance = [fastprob.mc_dropout_passes(net, tuple(x), passes=PASSES, seed=s)[1]["y"] for s in (1, 1, 2)]
    assert variance[0].equal(variance[1]) and not torch.isclose(variance[0], variance[2]).any()


def test_training_mode_batch_norm_and_parameters_stay():
    net, *x = problem()
    net.train()
    net.units.eval()  # flags of their own
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    x_before, layers = [t.clone() for t in x], list(net.modules())
    in_training = fastprob.mc_dropout_passes(net, tuple(x), passes=PASSES, seed=SEED)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert modes == [m.training for m in net.modules()] and layers == list(net.modules())
    assert not any(m._forward_hooks for m in net.modules())
    torch.testing.assert_close(x, x_before, rtol=0, atol=0)
    torch.testing.assert_close(
        in_training, fastprob.mc_dropout_passes(net.eval(), tuple(x), passes=PASSES, seed=SEED), rtol=0, atol=0
    )


def test_from_two_threads_while_a_third_looks():
    net, *x = problem()
    net.train()
    expected = fastprob.mc_dropout_passes(net, tuple(x), passes=PASSES, seed=SEED, batch_size=10)
    before, seen, results, done = copy.deepcopy(net.state_dict()), set(), [], threading.Event()

    def work():
        for _ in range(5):
            results.append(fastprob.mc_dropout_passes(net, tuple(x), passes=PASSES, seed=SEED, batch_size=10))

    def look():
        while not done.is_set():
            seen.update((m.training, len(m._forward_hooks)) for m in net.modules())

    threads, looker = [threading.Thread(target=work) for _ in range(2)], threading.Thread(target=look)
    for thread in (looker, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    looker.join()
    assert len(results) == 10 and seen == {(True, 0)}
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_buffers_that_a_module_writes_stay():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.register_buffer("calls", torch.zeros(()))
            self.scale = 2 * nn.Parameter(torch.ones(3))  # computed: deepcopy refuses it

        def forward(self, x):
            self.calls += 1
            return self.drop(x) * self.scale

    module = Counts()
    _, variance = fastprob.mc_dropout_passes(module, torch.ones(2, 3), passes=50)
    assert module.calls == 0 and (variance - 4).abs().max() < 1  # of 4 where kept, 0 where not


def test_parameters_are_shared():
    seen = []

    class Looks(nn.Linear):
        def forward(self, x):
            seen.append(self.weight)
            return super().forward(x)

    layer = Looks(3, 3)
    fastprob.mc_dropout_passes(nn.Sequential(nn.Dropout(), layer), torch.ones(2, 3), passes=2)
    assert seen and all(weight is layer.weight for weight in seen)


def test_adapter():
    """mu's mean and variance under the masks of `kept`, stream 0."""
    adapter, x = GGDAdapter(8, 12, dropout=0.3).double(), torch.randn(5, 8, dtype=torch.float64)
    mean, variance = fastprob.mc_dropout_passes(adapter, x, passes=PASSES, seed=SEED)
    hidden = adapter.before_dropout(x)
    passes = [adapter.heads(adapter.after_dropout(hidden * m) + x) for m in mask(12, 0.3, 0)]
    for i, each in enumerate(zip(*passes)):
        expected = statistics(torch.stack(each))
        torch.testing.assert_close((mean[i], variance[i]), expected, rtol=1e-12, atol=1e-12)


def test_adapter_as_the_fused_operator():
    adapter, x = GGDAdapter(8, 12, dropout=0.3).double(), torch.randn(5, 8, dtype=torch.float64)
    first, _, last = adapter.block_mu
    constant = first(x + adapter.after_dropout.bias)
    fold = first.weight @ adapter.after_dropout.weight
    hidden, options = adapter.before_dropout(x), {"passes": PASSES, "p": 0.3, "seed": SEED}
    mean, variance = fastprob.mc_dropout(hidden, constant, fold, last.weight, **options)
    (actual, *_), (of_actual, *_) = fastprob.mc_dropout_passes(adapter, x, passes=PASSES, seed=SEED)
    torch.testing.assert_close((actual, of_actual), (mean + last.bias, variance), rtol=1e-11, atol=1e-12)


def test_a_dropout_called_twice_drops_the_same_units():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(x) - self.drop(x)

    assert not fastprob.mc_dropout_passes(Twice(), torch.ones(2, 6), passes=PASSES)[1].any()


def test_encoder_layers_are_not_run_by_their_fused_path():
    """In evaluation mode it would leave dropout out."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    layer.self_attn.dropout = 0.0
    _, variance = fastprob.mc_dropout_passes(layer, torch.randn(4, 3, 8), passes=PASSES)
    assert variance.min() > 0


def test_encoders_are_run_without_nested_tensors():
    """Which dropout does not take, and an encoder in evaluation mode makes of padding."""

    class Encoder(nn.Module):
        def __init__(self, **options):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
            layer.self_attn.dropout = 0.0
            self.encoder = nn.TransformerEncoder(layer, 2, **options)

        def forward(self, x, padding):
            return self.encoder(x, src_key_padding_mask=padding)

    x, padding = torch.randn(4, 3, 8), torch.arange(3).expand(4, 3) > torch.tensor([[2], [0], [1], [2]])
    module = Encoder()
    actual = fastprob.mc_dropout_passes(module, (x, padding), passes=PASSES)
    expected = fastprob.mc_dropout_passes(Encoder(enable_nested_tensor=False), (x, padding), passes=PASSES)
    torch.testing.assert_close(actual, expected)
    assert module.encoder.use_nested_tensor


def test_compiled_modules_are_run_as_they_were_before():
    """Each call, and each pass, would compile them anew."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    inner, outer = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3)), [nn.Dropout(0.5), nn.Linear(4, 5)]
    plain = nn.Sequential(inner, *outer)
    net = torch.compile(nn.Sequential(torch.compile(inner, backend=backend), *outer), backend=backend)
    x = torch.randn(2, 3)
    results = [fastprob.mc_dropout_passes(m, x, passes=PASSES, batch_size=2) for m in (plain, net)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert not compiled


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_no_unit_and_every_unit(p):
    net, *x = problem()
    net.units.p = p
    mean, variance = fastprob.mc_dropout_passes(net, tuple(x), passes=PASSES, seed=SEED)
    if p:
        torch.testing.assert_close(mean["y"], net.last.bias + x[1])
        torch.testing.assert_close(variance["y"], torch.zeros(10, 5, dtype=torch.float64), rtol=0, atol=1e-12)
    else:  # the other dropout keeps its stream
        y = torch.stack([net.eval().last(h) for h in net_loop_of_channels(net, x[0])])
        torch.testing.assert_close(variance["y"], statistics(y)[1], rtol=1e-11, atol=1e-12)


def net_loop_of_channels(net, x):
    h = torch.relu(net.eval().norm(net.conv(x)))
    return [(h * m[:, None]).flatten(1) for m in mask(4, 0.4, 0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_small_variances_around_large_outputs(dtype):
    """A sum of squares of the outputs themselves would lose the variance."""
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1)).to(dtype)
    nn.init.constant_(network[1].weight, 2.0**-6)
    nn.init.constant_(network[1].bias, 0 if dtype == torch.bfloat16 else 4096)
    x = torch.ones(3, 4, dtype=dtype)
    _, variance = fastprob.mc_dropout_passes(network, x, passes=PASSES, seed=SEED)
    expected = (mask(4, 0.5, 0).sum(1) / 64).var(correction=0)
    torch.testing.assert_close(variance.double(), expected.expand(3, 1), rtol=0.01, atol=0)
    assert variance.dtype == dtype


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_whole_channels(shape):
    layer = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}[len(shape)](0.5)
    mean, _ = fastprob.mc_dropout_passes(layer, torch.ones(shape, dtype=torch.float64), passes=PASSES, seed=SEED)
    share = mask(3, 0.5, 0).mean(0)
    torch.testing.assert_close(mean, share.view(1, 3, *[1] * (len(shape) - 2)).expand(shape))


def test_no_rows():
    net, *x = problem(rows=0)
    mean, variance = fastprob.mc_dropout_passes(net, tuple(x), passes=PASSES)
    assert mean["y"].shape == variance["y"].shape == (0, 5)
    assert variance["both"][1][0].shape == (0, 4, 5)


def dropout_of(module):
    return nn.Sequential(nn.Dropout(0.5), module)


class Aside(nn.Sequential):
    def forward(self, x):
        return x


class Shape(nn.Sequential):
    """No tensor comes out."""

    def forward(self, x):
        return super().forward(x).shape


@pytest.mark.parametrize(
    ("module", "x", "options", "message"),
    [
        (nn.Dropout(), torch.ones(2, 3), {"passes": 0}, "passes and batch_size must be at least 1, got 0 and 1024"),
        (nn.Dropout(), torch.ones(2, 3), {"batch_size": 0}, "at least 1, got 5 and 0"),
        (nn.Dropout(), (torch.ones(2, 3), torch.ones(3, 3)), {}, r"several of one N, got \[\(2, 3\), \(3, 3\)\]"),
        (nn.Dropout(), torch.ones(()), {}, r"got \[\(\)\]"),
        (nn.Dropout(), [1.0], {}, r"got \['list'\]"),
        (nn.Linear(3, 3), torch.ones(2, 3), {}, "must have an nn.Dropout of p > 0, got none"),
        (nn.Dropout(0.0), torch.ones(2, 3), {}, "must have an nn.Dropout of p > 0, got none"),
        (dropout_of(nn.AlphaDropout(0.1)), torch.ones(2, 3), {}, "got AlphaDropout with dropout at '1'"),
        (dropout_of(nn.FeatureAlphaDropout(0.1)), torch.ones(2, 3), {}, "got FeatureAlphaDropout with dropout at '1'"),
        (dropout_of(nn.MultiheadAttention(4, 2, 0.1)), torch.ones(2, 4), {}, "got MultiheadAttention"),
        (nn.ModuleDict({"a": dropout_of(nn.LSTM(3, 3, 2, dropout=0.1))}), torch.ones(2, 3), {}, "got LSTM .* 'a.1'"),
        (Aside(nn.Dropout()), torch.ones(2, 3), {}, "its forward pass called none"),
        (nn.Sequential(nn.Flatten(0), nn.Dropout()), torch.ones(2, 3), {}, r"'1' must have the batch first, 2 here"),
        (nn.Dropout1d(), torch.ones(2, 3), {}, r"batch first, 2 here, got \(2, 3\)"),
        (type("Own", (nn.Dropout3d,), {})(), torch.ones(2, 3, 4, 5), {}, r"batch first, 2 here, got \(2, 3, 4, 5\)"),
        (nn.Sequential(nn.Dropout(), nn.Flatten(0)), torch.ones(2, 3), {}, r"outputs must be floating-point \[N"),
        (Shape(nn.Dropout()), torch.ones(2, 3), {}, r"outputs must be floating-point \[N, ...\], got Size"),
    ],
)
def test_bad_arguments_are_named(module, x, options, message):
    with pytest.raises(ValueError, match=f"mc_dropout_passes: .*{message}"):
        fastprob.mc_dropout_passes(module, x, **{"passes": 5, **options})


def test_layers_that_draw_nothing_may_stay():
    alone = nn.GRU(3, 3, bidirectional=True)
    alone.dropout = 0.1  # between layers, of which there is one
    module = Second(nn.AlphaDropout(0.0), nn.Dropout(), nn.LSTM(3, 3, 2), nn.MultiheadAttention(4, 2), alone)
    assert fastprob.mc_dropout_passes(module, torch.ones(2, 3), passes=PASSES)[1].any()


class Second(nn.Sequential):
    def forward(self, x):
        return self[1](x)
