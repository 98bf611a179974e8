"""The run on real pictures: fetching, captions, the split and the measures, on tiny files made here."""

import hashlib
import http.server
import io
import pathlib
import sys
import tarfile
import threading
import types
import zipfile

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from bench.real import fetch, measures, openclipart, parts, study
from bench.real.parts import Part
from bench.real.towers import Head, Rows, train_heads
from fastprob.adapters import PairedEmbeddings
from fastprob.data import DigitScenes
from fastprob.evaluation.selective import Ranked

# ------------------------------------------------------------------------------------------------- fetching


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves the server's `content`, from the byte that is asked for."""

    def do_GET(self):
        asked = self.headers["Range"]
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.send_response(206 if asked else 200)
        self.end_headers()
        self.wfile.write(self.server.content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def wheel(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def deb(files: dict[str, bytes], data: str = "data.tar.xz") -> bytes:
    """A Debian package: an ar archive, whose first members have an odd and an even size."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    members = {"debian-binary": b"2.0", "control.tar.xz": b"none", data: buffer.getvalue()}
    packed = b"!<arch>\n"
    for name, content in members.items():
        packed += f"{name:16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode() + content
        packed += b"\n" * (len(content) % 2)
    return packed


def source(server, content: bytes, file: str = "thing-1.0.whl") -> fetch.Source:
    server.content = content
    url = f"http://127.0.0.1:{server.server_port}/{file}"
    return fetch.Source("thing", url, len(content), hashlib.sha256(content).hexdigest(), "none")


def tgz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("pack, file", [(wheel, "a.whl"), (deb, "a.deb"), (tgz, "a.tgz")])
def test_a_source_is_fetched_and_unpacked_once(server, tmp_path, pack, file):
    wanted = source(server, pack({"usr/a.txt": b"a"}), file)
    for _ in range(2):
        assert (fetch.fetch(wanted, tmp_path) / "usr/a.txt").read_bytes() == b"a"
    assert server.asked == [None] and len(list(tmp_path.iterdir())) == 1


def test_a_cut_download_goes_on(server, tmp_path):
    wanted = source(server, wheel({"a.txt": b"a"}))
    (tmp_path / "thing-1.0.whl.part").write_bytes(server.content[:10])
    assert (fetch.fetch(wanted, tmp_path) / "a.txt").read_bytes() == b"a"
    assert server.asked == ["bytes=10-"]


def test_a_connection_that_ends_early_is_told_and_loses_nothing(server, tmp_path):
    wanted = source(server, content := wheel({"a.txt": b"a"}))
    server.content = content[:30]
    with pytest.raises(OSError, match=f"ended after 30 of {len(content)} bytes; the next call goes on from there"):
        fetch.fetch(wanted, tmp_path)
    server.content = content
    assert (fetch.fetch(wanted, tmp_path) / "a.txt").read_bytes() == b"a"
    assert server.asked == [None, "bytes=30-"]


def test_another_checksum_is_refused_and_deleted(server, tmp_path):
    wanted = source(server, wheel({"a.txt": b"a"}))
    server.content = server.content[::-1]
    with pytest.raises(ValueError, match=f"fetch: {wanted.url} must have sha256 {wanted.sha256} .* it was deleted"):
        fetch.fetch(wanted, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "file, content, error",
    [
        ("a.deb", deb({}, data="other.tar.xz"), ValueError),
        ("a.deb", b"no archive", ValueError),
        ("a.deb", deb({"a.txt": b"a", "../b.txt": b"b"}), tarfile.OutsideDestinationError),
        ("a.tgz", b"no archive", tarfile.ReadError),
        ("a.tgz", tgz({"a.txt": b"a", "../b.txt": b"b"}), tarfile.OutsideDestinationError),
    ],
)
def test_what_cannot_be_unpacked_leaves_nothing(tmp_path, file, content, error):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(error):
        fetch.unpack(tmp_path / file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_the_cache_is_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/cache")
    monkeypatch.delenv("FASTPROB_CACHE", raising=False)
    assert fetch.cache_directory() == pathlib.Path("/home/cache/fastprob")
    monkeypatch.setenv("FASTPROB_CACHE", "/elsewhere")
    assert fetch.cache_directory() == pathlib.Path("/elsewhere")
    assert fetch.cache_directory("/asked") == pathlib.Path("/asked")


# ------------------------------------------------------------------------------------------------- captions

SVG = """<svg xmlns="http://www.w3.org/2000/svg"><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about="">{title}
<dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
<dc:creator><cc:Agent><dc:title>Someone</dc:title></cc:Agent></dc:creator></cc:Work></rdf:RDF></metadata></svg>"""


def drawing(path, title, *keywords):
    title = "" if title is None else f"<dc:title>{title}</dc:title>"
    path.write_text(SVG.format(title=title, keywords="".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)))
    return path


def test_title_and_keywords_of_a_drawing(tmp_path):
    file = drawing(tmp_path / "a.svg", "Big_Cat  on\n a Mat", "cat", "Cat", "", "signs_and_symbols")
    assert openclipart.read_metadata(file) == ("big cat on a mat", ("cat", "signs and symbols"))


@pytest.mark.parametrize("title, keywords", [(None, ["cat"]), ("", ["cat"]), ("Cat", []), ("Cat", [" "])])
def test_a_drawing_without_title_or_keywords_has_no_metadata(tmp_path, title, keywords):
    assert openclipart.read_metadata(drawing(tmp_path / "a.svg", title, *keywords)) is None


def test_a_damaged_drawing_has_no_metadata(tmp_path):
    (tmp_path / "a.svg").write_text("<svg><metadata>")
    assert openclipart.read_metadata(tmp_path / "a.svg") is None


def test_pictures_are_found_by_their_drawings(tmp_path):
    from PIL import Image

    drawings, pictures = tmp_path / "drawings", tmp_path / "pictures"
    for name, size in {
        "animals/cat": (3, 2),
        "animals/whale": (2000, 1000),
        "shapes/star": (3, 2),
        "food/pie": None,
    }.items():
        for root, kind in ((drawings, "svg"), (pictures, "png")):
            (root / "usr/share/openclipart" / kind / name).parent.mkdir(parents=True, exist_ok=True)
        drawing(drawings / f"usr/share/openclipart/svg/{name}.svg", "Title", "word")
        if size:
            Image.new("RGB", size).save(pictures / f"usr/share/openclipart/png/{name}.png")
    (found,) = openclipart.find_pictures(drawings, pictures)
    assert (found.path.stem, found.title, found.keywords) == ("cat", "title", ("word",))


def picture(title, *keywords):
    return openclipart.Picture(pathlib.Path(f"{title}.png"), title, keywords)


def test_captions_and_what_they_are_true_of():
    pictures = [picture("tv", "tv", "screen"), picture("screen", "office"), picture("tv", "screen", "office")]
    captions = [caption for each in pictures for caption in openclipart.captions_of(each)]
    true = openclipart.truth(captions, pictures)
    found = {(caption.text, caption.kind): row.nonzero()[:, 0].tolist() for caption, row in zip(captions, true)}
    assert found == {
        ("tv, tv, screen", 0): [0, 2], ("tv", 1): [0, 2], ("screen", 2): [0, 1, 2],
        ("screen, office", 0): [1, 2], ("screen", 1): [0, 1, 2], ("office", 2): [1, 2],
        ("tv, screen, office", 0): [2],
    }  # fmt: skip


def test_every_picture_is_in_one_part_and_the_parts_stay():
    parts = openclipart.split(101)
    assert sorted(row for rows in parts.values() for row in rows) == list(range(101))
    assert [len(rows) for rows in parts.values()] == [45, 36, 5, 15]
    assert parts == openclipart.split(101)


# ------------------------------------------------------------------------------------------------- the study


@pytest.fixture
def part():
    """Three pictures; "thing" is written for all of them, "cat" for two."""
    generator = torch.Generator().manual_seed(0)
    captions = ["cat", "thing", "thing", "cat", "thing", "one dog"]
    text = torch.randn(4, 8, generator=generator)[[0, 1, 1, 0, 1, 2]]
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    truth = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 1]]).bool()
    normal = torch.nn.functional.normalize
    data = PairedEmbeddings(normal(torch.randn(3, 8, generator=generator), dim=1), normal(text, dim=1), owner)
    return Part(data, captions, truth, torch.zeros(6, dtype=torch.int64))


def test_a_part_is_read_as_it_was_saved(part, tmp_path):
    part.save(tmp_path / "part")
    again = Part.load(tmp_path / "part")
    assert again.captions == part.captions and torch.equal(again.truth, part.truth)
    assert torch.equal(again.data.text, part.data.text) and torch.equal(
        again.data.caption_image, part.data.caption_image
    )


def test_distinct_captions_are_the_first_with_their_text(part):
    assert part.distinct.tolist() == [0, 1, 5] and part.which.tolist() == [0, 1, 1, 0, 1, 2]


def test_balanced_data_has_every_distinct_caption_once(part):
    data = study.training_data(part, "balanced")
    assert torch.equal(data.image, part.data.text[[0, 1, 5]])
    assert data.caption_image.tolist() == [0, 1, 1, 0, 1, 2]
    assert torch.equal(data.text, part.data.image[part.data.caption_image])


@pytest.mark.parametrize("way, captions", [("specific", [0, 3, 5]), ("general", [1, 2, 4])])
def test_pictures_move_towards_one_of_their_captions(part, way, captions):
    expected = torch.nn.functional.normalize(part.data.image + part.data.text[captions], dim=1)
    assert torch.equal(study.training_data(part, way).image, expected)


def test_every_run_has_a_file_of_its_own():
    names = [setting.name for setting in study.settings()]
    assert len(set(names)) == len(names)
    assert all(name.endswith("plain-120epochs-seed0") or name.endswith("plain-60epochs-seed0") for name in names[:12])


@pytest.mark.parametrize("form", study.FORMS)
def test_a_run_is_what_its_judge_takes(part, form):
    setting = study.Setting("openclipart", form, 1.0, 0, "balanced", 2)
    result = study.run(setting, {"train": part, "test": part})
    assert len(result["text"]["test"]) == 3 and len(result["image"]["test"]) == 3
    wrong = measures.Judge(part, part).wrong
    queries = {"text -> image": 6, "image -> text": 3}
    assert {key: len(rows) for key, rows in wrong.items()} == {
        (way, rule): count for way, count in queries.items() for rule in ("own", "true")
    }


# ------------------------------------------------------------------------------------------------- measures


def test_an_interval_is_over_queries_and_seeds(part):
    """One seed has the best order and the other the worst: half of the draws of two seeds have one of each."""
    judge = measures.Judge(part, part)
    draws = judge.draws["text -> image"]
    assert draws.shape == (measures.DRAWS, 6) and draws[:, [1, 2]].equal(draws[:, [4, 1]])  # three of "thing"
    wrong = (torch.arange(6) % 3 == 0).double()
    gain = Ranked(wrong, wrong).gain().item(), Ranked(-wrong, wrong).gain().item()
    mean, low, high = measures.gain_interval([wrong, -wrong], wrong, torch.ones(400, 6).double())
    assert mean == pytest.approx(sum(gain) / 2) and (high, low) == pytest.approx(gain)
    assert measures.gain_interval([wrong], wrong, torch.ones(9, 6).double()) == pytest.approx((1, 1, 1))


def test_level_spearman_is_that_of_calibrate(part):
    from fastprob.evaluation.calibration import calibrate

    generator = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(40, 4, generator=generator), torch.randn(30, 4, generator=generator)
    score, match = torch.rand(40, generator=generator), torch.rand(40, 30, generator=generator) < 0.3
    wrong = (measures.match_rank(query, gallery, match) > 0).double()
    assert measures.level_spearman(score, wrong) == pytest.approx(calibrate(query, gallery, score, match).spearman)


def test_a_partial_correlation_leaves_out_what_is_given():
    generator = torch.Generator().manual_seed(0)
    given, noise, other = torch.randn(3, 4000, generator=generator).double()
    assert abs(measures.partial_spearman(given + noise, given + other, given)) < 0.05
    assert measures.partial_spearman(given + noise, given + noise + 0.1 * other, given) > 0.9


def test_scenes_outside_openclipart_pass_its_heads_once(monkeypatch, tmp_path):
    heads, calls = (Head(torch.rand(9, 6), 0.5, 4).eval(), Head(torch.rand(9, 5), 0.5, 4).eval()), []
    image, text = torch.rand(3, 6), torch.rand(15, 5)
    monkeypatch.setattr(parts, "SCENES", 3)
    monkeypatch.setattr(parts, "encode_openclipart", lambda cache: types.SimpleNamespace(heads=heads))
    monkeypatch.setattr(parts, "encode_images", lambda images, cache: calls.append(list(images)) or image)
    monkeypatch.setattr(parts, "encode_texts", lambda texts, cache: calls.append(list(texts)) or text)
    scenes = DigitScenes("test", num_scenes=3)
    for _ in range(2):
        found = parts.outside(tmp_path)
        assert found.data.image.equal(heads[0](image)) and found.data.text.equal(heads[1](text))
        assert found.data.caption_image.equal(scenes.caption_image) and found.captions == scenes.captions
        assert found.truth.equal(scenes.matches()) and not found.data.image.requires_grad
    assert [len(each) for each in calls] == [3, 15] and calls[0][2].tobytes() == scenes[2][0].tobytes()


def test_heads_are_trained_where_no_gradients_are_asked_for(monkeypatch):
    """The parts are made under no_grad."""
    monkeypatch.setattr("bench.real.towers.HEAD_EPOCHS", 1)
    rows = Rows(torch.rand(4, 6), torch.rand(8, 5), torch.arange(8) // 2)
    with torch.no_grad():
        heads = train_heads(rows)
    assert [head(x).shape for head, x in zip(heads, (rows.image, rows.text))] == [(4, 128), (8, 128)]
