"""The documentation: every snippet runs as it is typed, and every public name is on a page of the reference.

A page's snippets run in order, in one directory and one namespace. They find small real data there: embeddings and
pictures of scenes, and what README's snippets take as given. A small model of random weights stands in for ViT-B-32,
whose weights are a download. `<!-- test: skip, reason -->` in front of a snippet leaves it out.
"""

import html
import importlib
import inspect
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import toy_clip

import fastprob
from fastprob import cli
from fastprob._op import OPS
from fastprob.adapters import GGDAdapter
from fastprob.data import DigitScenes, digitscenes, embed, labelled
from fastprob.encoders import load_encoder

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
SNIPPET = re.compile(
    r"(?:^ *<!-- test: skip, (?P<reason>[^\n]+) -->\n)?^(?P<indent> *)```(?P<language>python|sh)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
OPERATORS = {name: op for name, op in OPS.items() if not name.startswith("own_")}  # but for those of tests
SCENES, SHOWN = 48, 90  # scenes of a split; scenes of a labelled one, of which a third shows one digit


@dataclass(frozen=True)
class Snippet:
    language: str
    code: str
    line: int
    reason: str | None
    """Why it is not run."""


def snippets(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    every = list(SNIPPET.finditer(text))
    assert len(re.findall("^ *```", text, re.MULTILINE)) == 2 * len(every), f"{page}: snippets are python or sh"
    for found in every:
        code = re.sub(f"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
        yield Snippet(found["language"], code, text.count("\n", 0, found.start("code")), found["reason"])


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    for split in ("train", "val", "test"):
        monkeypatch.setitem(digitscenes.DEFAULT_SCENES, split, SCENES)
        monkeypatch.setitem(labelled.DIGIT_SCENES, split, SHOWN)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """What the snippets call ViT-B-32 and its weights -> what is there."""
    directory = tmp_path_factory.mktemp("stand-in")
    toy_clip.register(directory, "stand-in", context_length=77, layers=2)
    return {"ViT-B-32": "stand-in", "laion2b_s34b_b79k": toy_clip.weights(directory, "stand-in", 0)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The directory that a page's snippets begin in."""
    directory = tmp_path_factory.mktemp("files")
    scenes = DigitScenes("val", num_scenes=SCENES)
    store = embed(scenes, load_encoder("tiny"), tmp_path_factory.mktemp("store"), progress=False)
    for name, array in (("image", store.image), ("text", store.text), ("pairs", store.caption_image)):
        np.save(directory / f"{name}.npy", array.numpy())
        np.save(directory / f"val_{name}.npy", array.numpy())
    (directory / "images").mkdir()
    rows = ["image,caption"]
    for number, (picture, captions) in enumerate(scenes):
        picture.save(directory / "images" / f"{number}.png")
        rows += [f'{number}.png,"{caption}"' for caption in captions]
    (directory / "captions.csv").write_text("\n".join(rows) + "\n")
    for number, name in enumerate(("three.png", "seven.png")):
        scenes[number][0].save(directory / name)
    torch.save({"state_dict": {"ctx": torch.zeros(16, 32)}}, directory / "model.pth.tar-50")
    return directory


def given():
    """What README's snippets take as given, of the arrays in this directory: each image with its first text."""
    image, owner = (torch.from_numpy(np.load(f"{name}.npy")) for name in ("image", "pairs"))
    x = features = constant = activations = logits = image
    caption_image = torch.arange(len(image))
    text = target = torch.from_numpy(np.load("text.npy"))[torch.searchsorted(owner, caption_image)]
    class_embeddings = prototypes = text[:10]
    labels = caption_image % 10
    queries, ids, keys, key_ids = image, caption_image, torch.cat([text, text]), caption_image.repeat(2)
    teacher, temperature, alpha = image.roll(1, 0), torch.tensor(0.07), torch.tensor(0.4)
    adapter = any_module = GGDAdapter(image.shape[1])
    image_distribution, text_distribution = adapter(image), GGDAdapter(image.shape[1])(text)
    image_mean, text_mean = image_distribution[0], text_distribution[0]
    image_variance, text_variance = (fastprob.ggd_variance(*of[1:]) for of in (image_distribution, text_distribution))
    own_text = text_distribution
    mu, inv_alpha, beta = image_distribution
    hidden, fold, last = adapter.before_dropout(image), adapter.after_dropout.weight, adapter.block_mu[-1].weight
    classnames, tokenizer = list(digitscenes.NAMES), open_clip.get_tokenizer("stand-in")
    ctx, images = torch.zeros(16, 32), torch.rand(4, 3, 16, 16)
    return locals()


def run_command(line):
    program, *arguments = shlex.split(line, comments=True)
    assert program == "fastprob", f"no such command here: {line}"
    assert cli.main(arguments) == 0, line


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", PAGES)
def test_snippets_run_as_they_are_typed(page, files, stand_in, tmp_path, monkeypatch):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names = given()
    for snippet in (each for each in snippets(page) if each.reason is None):
        code = re.sub("|".join(stand_in), lambda found: stand_in[found[0]], snippet.code)
        if snippet.language == "python":
            exec(compile("\n" * snippet.line + code, page, "exec"), names)
        else:
            for line in filter(None, code.replace("\\\n", "").splitlines()):
                run_command(line)


def test_few_snippets_are_skipped():
    skipped = [snippet.reason for page in PAGES for snippet in snippets(page) if snippet.reason]
    assert len(skipped) <= 4 and set(skipped) <= {"installs the package", "takes minutes", "a signature"}


# ------------------------------------------------------------------------------------------------ the site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """HTML files of the site by their paths in it, as `make docs` builds them."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    return {str(path.relative_to(directory)): path.read_text(encoding="utf-8") for path in directory.rglob("*.html")}


def public_names():
    """Of the package, its subpackages and the modules that stand for released code."""
    modules = [module for name in fastprob.__all__ if isinstance(module := getattr(fastprob, name), types.ModuleType)]
    released = pkgutil.iter_modules(fastprob.compat.__path__, "fastprob.compat.")
    modules += [importlib.import_module(module.name) for module in released]
    for module in (fastprob, *modules):
        for name in getattr(module, "__all__", ()):
            if name != "__version__" and not isinstance(getattr(module, name), types.ModuleType):
                yield f"{module.__name__}.{name}"


def test_every_public_name_is_in_the_reference(site):
    reference = "".join(page for path, page in site.items() if path.startswith("reference/"))
    names = {*public_names(), *(f"fastprob.{name}" for name in OPERATORS)}
    assert {"fastprob.ggd_nll", "fastprob.data.embed", "fastprob.compat.probvlm.TempCombLoss"} < names
    assert [name for name in sorted(names) if f'id="{name}"' not in reference] == []


def test_formulas_show_as_they_stand(site):
    blocks = "\n".join(re.findall("<pre>.*?</pre>", site["reference/operators.html"], re.DOTALL))
    shown = html.unescape(re.sub("<[^>]+>", "", blocks))
    assert "nll = clamp(t, clamp_min, clamp_max) - log a + lgamma(1 + 1/b)" in shown
    for name, op in OPERATORS.items():
        text = inspect.cleandoc(op.reference.__doc__).partition("\nArgs:")[0]
        for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE):
            assert line in shown, f"{name}: {line}"


def test_the_site_fetches_nothing(site):
    assert len(site) > 10
    for path, page in site.items():
        fetched = re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="((?:https?:)?//[^"]*)"', page)
        assert fetched == [], path
