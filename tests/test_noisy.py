"""Captions that are wrong for their images: each score against its formula, the order of the file, what is refused."""

import csv

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn.functional import normalize

import fastprob
import fastprob.cli as cli
from fastprob.adapters import PairedEmbeddings, ProbVLM, noisy
from fastprob.adapters.noisy import suspicion, write_suspects
from fastprob.data.arrays import embed_arrays
from fastprob.evaluation.signals import own_doubt


@pytest.fixture
def swapped():
    """60 images of 2 captions; those of 12 captions were swapped. One image has a caption more, another only one."""
    generator = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(60, 8, generator=generator), dim=1)
    owner = torch.arange(60).repeat_interleave(2)
    owner[3] = 2  # image 1 has one caption, image 2 the others
    text = image[owner] + 0.2 * torch.randn(120, 8, generator=generator)
    wrong = torch.zeros(120, dtype=torch.bool)
    wrong[10:120:10] = True
    text[wrong] = text[wrong].roll(1, 0)
    return PairedEmbeddings(image, text, owner), wrong


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    return ProbVLM(8, hidden=6).eval()


@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_doubt_is_that_of_both_softmaxes(swapped, temperature):
    data, _ = swapped
    logits = normalize(data.text, dim=1) @ data.image.T / temperature
    own = torch.arange(120), data.caption_image
    expected = -(logits.log_softmax(1) + logits.log_softmax(0))[own]
    torch.testing.assert_close(own_doubt(data, temperature), expected, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(
        suspicion(data, temperature=temperature)["doubt"].float(), expected, atol=2e-4, rtol=1e-5
    )


@pytest.mark.parametrize("rows", [7, 1024])
def test_scores_are_their_formulas(swapped, adapter, monkeypatch, rows):
    monkeypatch.setattr(noisy, "_ROWS", rows)
    data, _ = swapped
    scores = suspicion(data, adapter=adapter)
    assert tuple(scores) == noisy.SCORES and all(score.dtype == torch.float64 for score in scores.values())
    for row in (0, 50, 119):
        image, text = data.image[data.caption_image[row]], data.text[row]
        others = [i for i in (data.caption_image == data.caption_image[row]).nonzero()[:, 0].tolist() if i != row]
        middle = normalize(data.text[others], dim=1).mean(0)
        with torch.no_grad():
            of_image, of_text = adapter(image, text)
        nll = fastprob.ggd_nll(*of_image, text) + fastprob.ggd_nll(*of_text, image)
        expected = {
            "cosine": 1 - torch.cosine_similarity(image, text, 0),
            "siblings": 1 - torch.cosine_similarity(text, middle, 0),
            "likelihood": nll,
            "match": fastprob.ggd_match_nll(*of_image, *of_text),
        }
        for name, value in expected.items():
            assert float(scores[name][row]) == pytest.approx(float(value), rel=1e-4), name
    assert scores["siblings"].isnan().nonzero()[:, 0].tolist() == [2]


def test_wrong_captions_come_first(swapped):
    data, wrong = swapped
    scores = suspicion(data)
    for name in ("doubt", "cosine"):
        assert average_precision_score(wrong, scores[name]) > 0.9, name
    assert average_precision_score(wrong, scores["siblings"].nan_to_num()) > 0.45  # of two captions both are suspicious


@pytest.fixture
def store(swapped, tmp_path):
    data, _ = swapped
    captions = [f'caption {i}, "quoted"' for i in range(120)]
    text = data.text[order := data.caption_image.argsort(stable=True)]
    return embed_arrays(
        data.image, text, tmp_path / "store", pairs=data.caption_image[order], captions=captions, progress=False
    )


@pytest.mark.parametrize("by", ["doubt", "siblings", "match"])
def test_the_file_has_the_most_suspicious_first(store, adapter, tmp_path, by):
    file = write_suspects(store, tmp_path / "out" / "suspects.csv", adapter=adapter, by=by)
    with open(file, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    scores = suspicion(store, adapter=adapter)
    assert list(rows[0]) == ["image", "caption", *noisy.SCORES] and len(rows) == 120
    numbers = [int(row["caption"].split(",")[0].split()[1]) for row in rows]
    assert sorted(numbers) == list(range(120))
    for row, number in zip(rows, numbers):
        assert row["image"] == str(int(store.caption_image[number]))
        for name, score in scores.items():
            assert row[name] == ("" if score[number].isnan() else f"{float(score[number]):.6g}")
    ordered = [float(scores[by][number]) for number in numbers]
    has = [score for score in ordered if score == score]
    assert has == sorted(has, reverse=True) and has == ordered[: len(has)]


def test_what_is_refused(store, adapter, tmp_path):
    (tmp_path / "there.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"write_suspects: path must be a new file, .*there.csv exists already"):
        write_suspects(store, tmp_path / "there.csv")
    assert (tmp_path / "there.csv").read_text() == "mine"
    with pytest.raises(ValueError, match=r"write_suspects: by must be one of 'doubt', .* got 'doubts'"):
        write_suspects(store, tmp_path / "a.csv", by="doubts")
    with pytest.raises(ValueError, match="write_suspects: adapter must be given to order by 'match', got None"):
        write_suspects(store, tmp_path / "a.csv", by="match")
    with pytest.raises(ValueError, match="suspicion: temperature must be > 0, got 0"):
        suspicion(store, temperature=0)
    with pytest.raises(ValueError, match="suspicion: adapter must be of width 8, got 5"):
        suspicion(store, adapter=ProbVLM(5, hidden=6))
    assert not (tmp_path / "a.csv").exists()


def test_the_command_writes_that_file_once(store, adapter, tmp_path, capsys):
    adapter.save(tmp_path / "run" / "best.safetensors")
    command = ["noisy", "--store", store.path, "--out", tmp_path / "a.csv", "--by", "match", "--device", "cpu"]
    command = [str(word) for word in [*command, "--checkpoint", tmp_path / "run"]]
    assert cli.main(command) == 0
    expected = write_suspects(store, tmp_path / "b.csv", adapter=adapter, by="match")
    assert (tmp_path / "a.csv").read_bytes() == expected.read_bytes()
    assert cli.main(command) == 2
    assert "error: --out must be a new file" in capsys.readouterr().err
