"""The adapter: released names and weights, saving and loading, where an untrained one starts."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastprob._files import write_atomically
from fastprob.adapters import GGDAdapter, ProbVLM, predict

RELEASED = ["mod.0", "mod.2", "mod.5"] + [f"block_{head}.{i}" for head in ("mu", "alpha", "beta") for i in (0, 2)]
RELEASED_KEYS = [f"{layer}.{kind}" for layer in RELEASED for kind in ("weight", "bias")]


def released_adapter(dim, hidden, dropout):
    """The released architecture, written down from its description and not from ours."""

    def head(*last):
        return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), *last)

    trunk = [nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout)]
    return nn.ModuleDict(
        {
            "mod": nn.Sequential(*trunk, nn.Linear(hidden, dim)),
            "block_mu": head(),
            "block_alpha": head(nn.ReLU()),
            "block_beta": head(nn.ReLU()),
        }
    )


def released_checkpoint(path, dim=12, hidden=7):
    torch.manual_seed(3)
    adapters = {"img_BayesCap": released_adapter(dim, hidden, 0.1), "txt_BayesCap": released_adapter(dim, hidden, 0.1)}
    adapters = nn.ModuleDict(adapters)
    torch.save(adapters.state_dict(), path)
    return adapters.eval()


def test_state_dict_has_the_released_keys():
    assert sorted(GGDAdapter(6, 4).state_dict()) == sorted(RELEASED_KEYS)


def test_released_checkpoint_gives_the_released_outputs(tmp_path):
    theirs = released_checkpoint(tmp_path / "released.pth")
    ours = ProbVLM.from_released(tmp_path / "released.pth")
    assert ours.config == {"dim": 12, "hidden": 7, "dropout": 0.1, "positive": "relu"}
    x = {"img_BayesCap": torch.randn(5, 12), "txt_BayesCap": torch.randn(5, 12)}
    outputs = dict(zip(x, ours(*x.values()), strict=True))
    for name, rows in x.items():
        features = theirs[name]["mod"](rows) + rows
        for got, head in zip(outputs[name], ("block_mu", "block_alpha", "block_beta"), strict=True):
            torch.testing.assert_close(got, theirs[name][head](features), rtol=0, atol=0)


def test_released_checkpoint_of_another_model_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="must hold img_BayesCap"):
        ProbVLM.from_released(tmp_path / "other.pth")
    state = released_checkpoint(tmp_path / "released.pth").state_dict()
    del state["txt_BayesCap.block_beta.2.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"text\.block_beta\.2\.bias"):
        ProbVLM.from_released(tmp_path / "part.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"garbage", "must be a checkpoint, it can't be read: "),
        (b"", "must be a checkpoint, it can't be read: EOFError"),
        ({"weight": Path("x")}, "must be a checkpoint, it can't be read: Weights only load failed"),
        ([1, 2], "must hold img_BayesCap"),
        ({"img_BayesCap.mod.0.weight": torch.zeros(3)}, "must hold img_BayesCap"),
        ({"img_BayesCap.mod.0.weight": "x"}, "must hold img_BayesCap"),
        ({"img_BayesCap.mod.0.weight": torch.zeros(3, 4), 5: torch.zeros(1)}, "must hold img_BayesCap"),
        ({"img_BayesCap.mod.0.weight": torch.zeros(3, 4)}, "does not fit a ProbVLM of"),
    ],
)
def test_what_is_no_released_checkpoint_is_refused(tmp_path, content, message):
    file = tmp_path / "other.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=f"ProbVLM.from_released: .*other.pth {message}") as caught:
        ProbVLM.from_released(file)
    assert "weights_only=False" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        ProbVLM.from_released(tmp_path / "none.pth")


def test_the_forward_is_the_documented_formula():
    adapter = GGDAdapter(6, 4, positive="softplus").double().eval()
    x = torch.randn(3, 6, dtype=torch.float64)
    w = {name: tensor.detach() for name, tensor in adapter.state_dict().items()}

    def linear(layer, rows):
        return rows @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]

    f = x + linear("mod.5", linear("mod.2", linear("mod.0", x).relu()).relu())
    mu, inv_alpha, beta = adapter(x)
    raw = {head: linear(f"block_{head}.2", linear(f"block_{head}.0", f).relu()) for head in ("mu", "alpha", "beta")}
    torch.testing.assert_close(mu, raw["mu"])
    torch.testing.assert_close(inv_alpha, raw["alpha"].exp().log1p())
    torch.testing.assert_close(beta, raw["beta"].exp().log1p())


@pytest.mark.parametrize("positive", ["relu", "softplus"])
def test_an_untrained_adapter_starts_near_a_unit_laplace(positive):
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(200, 512), dim=1)
    _, inv_alpha, beta = GGDAdapter(positive=positive)(x)
    for value in (inv_alpha, beta):
        assert value.min() > 0.5 and value.max() < 1.5


def test_only_training_drops_units():
    adapter, x = GGDAdapter(8, 16, 0.5), torch.randn(4, 8)
    assert not adapter(x)[0].equal(adapter(x)[0])
    adapter.eval()
    assert adapter(x)[0].equal(adapter(x)[0])


@pytest.mark.parametrize("positive", ["relu", "softplus"])
def test_save_and_load_restore_weights_and_config(tmp_path, positive):
    model = ProbVLM(6, 4, 0.25, positive=positive).eval()
    model.save(tmp_path / "new" / "model.safetensors")
    back = ProbVLM.load(tmp_path / "new" / "model.safetensors")
    assert back.config == model.config and not back.training
    x, y = torch.randn(3, 6), torch.randn(3, 6)
    for ours, theirs in zip(model(x, y), back(x, y), strict=True):
        assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("power", [1.0, 2])
def test_a_fixed_power_is_that_of_every_distribution(tmp_path, power):
    model = ProbVLM(6, 4, power=power).eval()
    x = torch.randn(3, 6)
    _, inv_alpha, beta = model.image(x)
    assert beta.tolist() == [[pytest.approx(power - 1e-4)] * 6] * 3 and len(inv_alpha.unique()) == 18
    variance = {1.0: 2, 2: 0.5}[power] / (inv_alpha + 1e-4) ** 2
    torch.testing.assert_close(predict(model.image, x).aleatoric, variance.detach())
    model.save(tmp_path / "model")
    again = ProbVLM.load(tmp_path / "model")
    assert again.config == {"dim": 6, "hidden": 4, "dropout": 0.1, "positive": "softplus", "power": power}
    assert again.text(x)[2].equal(model.text(x)[2])
    assert "power" not in ProbVLM(6, 4).config and not any("beta" in name for name in model.state_dict())


def test_load_refuses_another_file(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="must have format"):
        ProbVLM.load(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        ProbVLM.load(tmp_path / "broken.safetensors")
    with pytest.raises(FileNotFoundError):
        ProbVLM.load(tmp_path / "none.safetensors")


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def full(temporary, _):
        temporary.write_text("ne")
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match=f"disk full: '{path}'"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("make", [GGDAdapter, ProbVLM])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be a positive integer, got 0"),
        ({"hidden": 2.5}, "hidden must be a positive integer, got 2.5"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": float("nan")}, "dropout must be in"),
        ({"positive": "exp"}, "positive must be one of .*got 'exp'"),
        ({"power": 0}, "power must be None or finite and > 0.0001, got 0"),
        ({"power": float("inf")}, "power must be None or .*got inf"),
        ({"power": "two"}, "power must be None or .*got 'two'"),
    ],
)
def test_bad_arguments(make, arguments, message):
    with pytest.raises(ValueError, match=f"{make.__name__}: {message}"):
        make(**arguments)


def test_bad_input_width():
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 6\], got \(3, 5\)"):
        GGDAdapter(6, 4)(torch.zeros(3, 5))


CONFIG = {"dim": 8, "hidden": 4, "dropout": 0.1, "positive": "relu"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, "must have a config in JSON, got none"),
        ("{", "must have a config in JSON, got: Expecting property name"),
        ("[" * 100_000, "must have a config in JSON, got: "),
        ("7", "must have a config of ['dim', 'dropout', 'hidden', 'positive'], got 7"),
        ({"dim": 8}, "must have a config of ['dim', 'dropout', 'hidden', 'positive'], got {'dim': 8}"),
        ({**CONFIG, "depth": 2}, "must have a config of ['dim', 'dropout', 'hidden', 'positive'], got {'dim': 8, "),
        ({**CONFIG, "dim": "8"}, ": dim must be a positive integer, got '8'"),
        ({**CONFIG, "dropout": "x"}, ": dropout must be in [0, 1), got 'x'"),
        ({**CONFIG, "dropout": None}, ": dropout must be in [0, 1), got None"),
        ({**CONFIG, "positive": ["relu"]}, ": positive must be one of ['relu', 'softplus'], got ['relu']"),
        ({**CONFIG, "hidden": 5}, "does not fit a ProbVLM of {'dim': 8, 'hidden': 5, "),
        ({**CONFIG, "dim": 10_000_000}, "does not fit a ProbVLM of {'dim': 10000000, "),
        ({**CONFIG, "dim": 10**15}, "does not fit a ProbVLM of {'dim': 1000000000000000, "),
    ],
)
def test_load_names_a_damaged_config(tmp_path, config, expected):
    """Before memory is taken for what it asks for."""
    path, model = tmp_path / "model.safetensors", ProbVLM(8, 4, positive="relu")
    text = config if config is None or isinstance(config, str) else json.dumps(config)
    metadata = {"format": "fastprob.ProbVLM/1", **({} if text is None else {"config": text})}
    save_file(model.state_dict(), path, metadata)
    with pytest.raises(ValueError) as caught:
        ProbVLM.load(path)
    assert str(caught.value).startswith(f"ProbVLM.load: {path}") and expected in str(caught.value)
