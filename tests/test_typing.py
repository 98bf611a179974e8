"""Types as an editor or mypy sees them: a user's snippet, checked against the package as it is shipped."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SNIPPET = """
import torch
import fastprob
import fastprob.ops.ggd_nll
from fastprob.distributions import GeneralizedNormal

x = torch.ones(3)
fastprob.ggd_nll  # is: def (mu: Tensor, inv_alpha: Tensor, beta: Tensor, target: Tensor, *, form: str =, ...) -> Tensor
fastprob.ggd_nll(x, x, x, target=x, form="paper")  # is: Tensor
fastprob.ggd_nll(x, x, x)  # error: Missing positional argument "target"
fastprob.ggd_nll(x, x, x, x, frm="paper")  # error: Unexpected keyword argument "frm"
fastprob.ggd_nll(x, x, x, x, form=1)  # error: incompatible type "int"; expected "str"
fastprob.ggd_nll(x, x, x, 1.0)  # error: incompatible type "float"; expected "Tensor"
fastprob.ggd_variance(x, x, 3)  # error: Too many arguments
fastprob.probvlm_loss(x, x, x, x, x, x, x, x, cross_weight=0.1)  # is: Tensor
fastprob.gaussian_potential(x, t=2)  # is: Tensor
fastprob.prototype_dispersion(x, x, labels=x)  # is: Tensor
fastprob.ops.ggd_nll  # is: types.ModuleType

loss = fastprob.nn.GGDNLLLoss(form="released", eps=0.1)
loss  # is: fastprob.nn.GGDNLLLoss
loss(x, x, x, target=x)  # is: Tensor
loss(1.0)  # error: incompatible type "float"; expected "Tensor"
fastprob.nn.ProbVLMLoss(form=x)  # error: incompatible type "Tensor"; expected "float | str"

d = GeneralizedNormal(0.0, x, 2)
d.log_prob(0.3)  # is: Tensor
d.rsample((2,))  # is: Tensor
d.variance  # is: Tensor
d.expand((2, 3))  # is: fastprob.distributions.GeneralizedNormal
fastprob.distributions.GeneralizedNormal("0", 1, 2)  # error: incompatible type "str"; expected "Tensor | float"

fastprob.adapters.ProbVLM(dim=4)  # is: fastprob.adapters.adapter.ProbVLM
fastprob.data.embed_arrays  # is: def (...) -> fastprob.data.store.EmbeddingStore
fastprob.prompts.DAPT  # is: def (...) -> fastprob.prompts.methods.DAPT
fastprob.info()  # is: str
fastprob.no_such_name  # error: Module has no attribute "no_such_name"
"""


def asked(line):
    """The line, its type revealed if it asks for that, and what mypy has to say of it."""
    code, kind, text = re.fullmatch(r"(.*?)(?:  # (is|error): (.*))?", line).groups()
    if kind is None:
        return code, None
    pattern = ".*".join(re.escape(part) for part in text.split("..."))
    return (
        (f"reveal_type({code})", f'note: Revealed type is "{pattern}"')
        if kind == "is"
        else (code, f"error: .*{pattern}")
    )


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The package's files as a wheel has them."""
    folder = tmp_path_factory.mktemp("shipped")
    build = ["setup.py", "-q", "egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder / "lib")]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True, timeout=300)
    return folder / "lib"


def test_operators_losses_and_distributions_keep_their_types(shipped, tmp_path, request):
    pytest.importorskip("mypy")
    code, expected = zip(*map(asked, SNIPPET.splitlines()))
    (tmp_path / "snippet.py").write_text("\n".join(code))
    cache = request.config.cache.mkdir("mypy")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), "snippet.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(shipped)}, capture_output=True, text=True, timeout=300
    )
    said = {}
    for line in done.stdout.splitlines():
        if (found := re.match(r"snippet.py:(\d+): (.*)", line)) and " defined in " not in line:
            said[int(found[1])] = found[2].replace("torch._tensor.", "")
    for number, (source, pattern) in enumerate(zip(code, expected), 1):
        if pattern is None:
            assert number not in said, f"{source}: {said[number]}"
        else:
            assert re.match(pattern, said.get(number, "")), f"{source}: {said.get(number)}, expected {pattern}\n{done}"
