"""What `import fastprob` gives: the operators at once, the subpackages when asked for, every module by its name."""

import importlib
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fastprob

SUBPACKAGES = [
    "adapters",
    "attribution",
    "compat",
    "data",
    "distributions",
    "encoders",
    "evaluation",
    "nn",
    "pretraining",
    "prompts",
    "training",
]
LAZY = f"""
import sys
import fastprob
early = {{"open_clip", "PIL", *("fastprob." + name for name in {SUBPACKAGES})}} & set(sys.modules)
assert not early, f"imported before it is asked for: {{early}}"
names = [name for name in fastprob.__all__ if not name.startswith("_")]
assert {{*{SUBPACKAGES}}} < set(names)
for name in names:
    assert getattr(fastprob, name) is not None
print(fastprob.nn.GGDNLLLoss(), fastprob.distributions.GeneralizedNormal(0.0, 1.0, 2.0))
"""


def test_subpackages_are_imported_when_they_are_asked_for():
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "GGDNLLLoss() GeneralizedNormal(loc: 0.0, scale: 1.0, power: 2.0)\n"
    with pytest.raises(AttributeError, match="module 'fastprob' has no attribute 'no_such_name'"):
        fastprob.no_such_name  # noqa: B018 (the access is the test)


LIGHT = ("adapters", "data", "evaluation", "training")
EXPORTS = """
import importlib, sys
for name in {LIGHT}:
    module = importlib.import_module("fastprob." + name)
    assert module.__all__ and all(hasattr(module, each) for each in module.__all__), name
slow = {{"matplotlib", "open_clip", "pyarrow", "sklearn", "torchvision"}} & set(sys.modules)
assert not slow, f"imported before it is asked for: {{slow}}"
from fastprob.adapters import Report, TrainConfig, evaluate_store, fit, predict, rank, write_predictions
from fastprob.data import DigitScenes, EmbeddingStore, ImageCaptions, LabelledImages, PairedEmbeddings
from fastprob.data import embed, embed_arrays, open_dataset, open_splits
from fastprob.evaluation import Calibration, Evaluation, calibrate, evaluate, recall_at_k, spearman
"""


def test_subpackages_export_what_people_need_and_stay_light():
    run = subprocess.run(
        [sys.executable, "-c", EXPORTS.format(LIGHT=LIGHT)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr


def test_the_wheel_holds_every_package():
    root = Path(__file__).parent.parent
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(file.parent.relative_to(root).parts) for file in (root / "fastprob").rglob("__init__.py")}
    assert set(listed) == found | {"fastprob.kernels"}


def test_no_function_hides_a_module():
    found = [info.name for info in pkgutil.walk_packages(fastprob.__path__, "fastprob.")]
    names = [name for name in found if not name.startswith(("fastprob._c", "fastprob.__main__", "fastprob.kernels."))]
    assert {"fastprob.ops.ggd_nll", "fastprob.nn", "fastprob.compat.probvlm"} < set(names)
    for name in names:
        importlib.import_module(name)
        parent, _, child = name.rpartition(".")
        assert isinstance(getattr(sys.modules[parent], child), types.ModuleType), name
