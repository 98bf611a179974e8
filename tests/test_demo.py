"""The demo, with few scenes and epochs: its report holds what the library finds."""

import json
import re

import pytest

from fastprob.adapters import TrainConfig, fit
from fastprob.adapters.report import evaluate_store
from fastprob.data import digitscenes
from fastprob.data.store import EmbeddingStore
from fastprob.demo import probvlm, speed, study

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.long]


def test_probvlm_demo(tmp_path, monkeypatch, capsys):
    for split, count in {"train": 60, "val": 30, "test": 40}.items():
        monkeypatch.setitem(digitscenes.DEFAULT_SCENES, split, count)
    monkeypatch.setattr(speed, "SHAPE", (4, 8))
    monkeypatch.setattr(study, "SEEDS", (0, 3))
    monkeypatch.setattr(probvlm, "HEADS", (("relu", "released"),))
    probvlm.run(tmp_path, epochs=2, study_epochs=1)
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    for file in re.findall(r"\]\((\w+\.png)\)", text):
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 4 and page.count("<article>") == 32 and page.count("<img") > 3 + 16
    report = json.loads((tmp_path / "report.json").read_text())
    assert f"{report['ambiguity_spearman']:+.2f}." in text
    assert f"S = {report['text_to_image']['spearman']:+.2f}" in text
    judged = report["comparisons"]["text -> image, own"]["scores"]["p(wrong)"]["aurc"]
    assert f"- text -> image, own: {judged['value']:.3f} [{judged['low']:.3f}, {judged['high']:.3f}]; 1 - max" in text
    history = json.loads((tmp_path / "adapter" / "history.json").read_text())
    assert len(history["val_nll"]) == 2 and f"{history['nll_after']:.3f} after" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| relu")]
    assert [row[2] for row in rows] == ["0.0001", "0.1", "1"]
    stores = {split: EmbeddingStore(tmp_path / "embeddings" / split) for split in ("train", "test")}
    found = []
    for seed in (0, 3):
        config = TrainConfig(epochs=1, positive="relu", form="released", cross_weight=0.1, seed=seed)
        model = fit(stores["train"], config=config, device="cpu", progress=False).model
        found.append(evaluate_store(model, stores["test"], passes=0))
    s = [each.evaluation.text_to_image.spearman for each in found]
    assert rows[1][3] == f"{sum(each.ambiguity_spearman for each in found) / 2:+.2f}"
    assert rows[1][4] == f"{sum(s) / 2:+.2f} ({min(s):+.2f} to {max(s):+.2f})"
    recalls = zip(*(each.evaluation.text_to_image.recall for each in found))
    assert rows[1][5] == " ".join(f"{sum(level) / 2:.2f}" for level in recalls) + " |"
    assert set(json.loads((tmp_path / "speed.json").read_text())) == {"loss_ms", "epoch_s"}
