"""Pages: what is on them against torch and plain Python, their HTML, and how they stand in a real browser."""

import base64
import io
import re
from html.parser import HTMLParser

import browser
import numpy as np
import pytest
import torch
from PIL import Image
from test_error import pairs
from torch.nn.functional import cosine_similarity, normalize

from fastprob.adapters import ProbVLM, fit_error
from fastprob.adapters.pages import write_report_page
from fastprob.adapters.predictions import write_predictions
from fastprob.adapters.report import evaluate_store
from fastprob.data.arrays import embed_arrays
from fastprob.evaluation.calibration import uncertainty_levels
from fastprob.evaluation.examples import examples
from fastprob.evaluation.page import THUMBNAIL, Item, Section, Table, thumbnail, write_page

pytestmark = pytest.mark.usefixtures("one_thread")

NASTY = '<script>alert(1)</script> & "quotes"'
OWNER = torch.arange(40) // 2  # the image of each text
CAPTIONS = ["a cat" if i % 5 == 3 else f"caption {i}" for i in range(40)]
CAPTIONS[0], CAPTIONS[9] = NASTY, "the word " + "x" * 1000
IDS = [f"{i}.jpg" for i in range(20)]
IDS[2], IDS[3] = "<img src=x onerror=alert(2)>", "folder/" + "y" * 200 + ".jpg"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    generator = torch.Generator().manual_seed(1)
    image, text = (normalize(torch.randn(rows, 5, generator=generator), dim=1) for rows in (20, 40))
    first = [CAPTIONS.index(caption) for caption in CAPTIONS]  # equal captions have equal embeddings
    about = {"pairs": OWNER, "captions": CAPTIONS, "ids": IDS, "encoder_name": "<b>none</b>", "progress": False}
    return embed_arrays(image, text[first], tmp_path_factory.mktemp("data") / "store", **about)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ProbVLM(5, hidden=8).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def picture(row):
    return Image.effect_noise((300 + row, 200) if row % 2 else (20, 30), 50).convert("RGB")


@pytest.fixture(scope="module")
def pages(tmp_path_factory, store, model):
    """A report's and a prediction's, with pictures, every image and text on both."""
    out = tmp_path_factory.mktemp("pages")
    error = fit_error(pairs(60, 0, dim=5), adapter=model, passes=3)
    report = evaluate_store(model, store, passes=3, levels=4, error=error, outside=store)
    options = {"shown": 20, "pictures": picture, "checkpoint": 'run/"best"'}
    write_report_page(report, store, out / "report.html", figures=report.draw(out), **options)
    write_predictions(model, store, out, passes=3, levels=4, progress=False, **options)
    return out


ASKED = ["Which score tells wrong from right?", "Sets that hold the match as often as promised"]
ASKED += ["Which score tells what has no match here?", "Levels of uncertainty"]
SECTIONS = {
    "report.html": ["What was evaluated", "What it says", "Figures", *ASKED, "Texts", "Images"],
    "index.html": ["What was predicted", "Texts", "Images"],
}


# ------------------------------------------------------------------------------------------ the examples


def different(side):
    """Rows of the first of equal captions, or of all images."""
    return [i for i in range(40) if CAPTIONS.index(CAPTIONS[i]) == i] if side == "text" else list(range(20))


def images_of(side, row):
    return {row} if side == "image" else {int(OWNER[i]) for i in range(40) if CAPTIONS[i] == CAPTIONS[row]}


@pytest.mark.parametrize("key", ["own", "class", "none"])
@pytest.mark.parametrize("shown", [3, 50])
def test_the_most_and_the_least_certain_with_what_they_retrieve(store, shown, key):
    keys = {"own": torch.arange(20), "class": torch.arange(20) % 3, "none": None}[key]
    generator = torch.Generator().manual_seed(2)
    uncertainty = {side: torch.rand(rows, generator=generator) for side, rows in (("image", 20), ("text", 40))}
    found = examples(store, uncertainty, levels=4, shown=shown, key=keys)
    assert [section.title for section in found] == ["Texts", "Images"]
    for section, side, other in zip(found, ("text", "image"), ("image", "text")):
        order = sorted(different(side), key=lambda row: float(uncertainty[side][row]))
        half = min(shown, (len(order) + 1) // 2)
        ends = {"most": order[:half], "least": order[::-1][: min(shown, len(order) - half)]}
        assert [title for title, _ in section.groups] == [f"The {which} certain {side}s" for which in ends]
        level = 1 + uncertainty_levels(uncertainty[side], 4)
        for rows, (_, items) in zip(ends.values(), section.groups):
            assert [item.name for item in items] == [(CAPTIONS if side == "text" else IDS)[row] for row in rows]
            for row, item in zip(rows, items):
                assert item.numbers == [
                    ("uncertainty", f"{float(uncertainty[side][row]):#.3g}"),
                    ("level", f"{level[row]} of 4"),
                ]
                cosine = cosine_similarity(getattr(store, side)[row], getattr(store, other))
                best = sorted(different(other), key=lambda each: -float(cosine[each]))[:3]
                assert [match.name for match in item.matches] == [
                    (CAPTIONS if other == "text" else IDS)[each] for each in best
                ]
                for each, match in zip(best, item.matches):
                    numbers = dict(match.numbers)
                    assert float(numbers["cosine"]) == pytest.approx(float(cosine[each]), abs=6e-4)
                    assert numbers["uncertainty"] == f"{float(uncertainty[other][each]):#.3g}"
                    if keys is None:
                        assert match.right is None
                    else:
                        same = keys[list(images_of(side, row))][:, None] == keys[list(images_of(other, each))]
                        assert match.right is bool(same.any())
    if shown == 50:
        assert sum(len(items) for _, items in found[0].groups) == len(different("text")) == 33


def test_a_text_says_how_many_images_have_it(store):
    uncertainty = {"image": torch.zeros(20), "text": torch.arange(40.0)}
    (_, items), _ = examples(store, uncertainty, levels=2, shown=4)[0].groups
    assert [item.about for item in items[2:]] == [[f"written for {IDS[1]}"], [f"written for {IDS[1]} and 7 more"]]


def test_pictures_are_those_of_the_rows(store):
    asked = []

    def pictures(row):
        asked.append(row)
        return Image.new("RGB", (4, 4), (row, 0, 0))

    uncertainty = {"image": torch.arange(20.0), "text": torch.arange(40.0)}
    texts, images = examples(store, uncertainty, levels=2, shown=2, pictures=pictures)
    (_, most), (_, least) = images.groups
    assert [pixel(item.picture) for item in (*most, *least)] == [(row, 0, 0) for row in (0, 1, 19, 18)]
    assert most[0].picture.alt == NASTY and least[0].picture.alt == CAPTIONS[38] == "a cat"
    assert all(match.picture is None for item in most for match in item.matches)
    for item in texts.groups[0][1]:
        for match in item.matches:
            assert pixel(match.picture) == (IDS.index(match.name), 0, 0)
    assert len(asked) == 4 + 4 + 4 * 3  # the images, the texts' own, and what those retrieve


# --------------------------------------------------------------------------------------------- thumbnails


def opened(picture):
    kind, data = re.fullmatch(r"data:image/(\w+);base64,(.+)", picture.uri).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format.lower() == kind and image.size == (picture.width, picture.height)
    return image


def pixel(picture):
    return opened(picture).getpixel((0, 0))


@pytest.mark.parametrize(
    ("size", "expected", "format"),
    [
        ((1000, 500), (160, 80), "JPEG"),
        ((90, 3000), (5, 160), "JPEG"),
        ((161, 161), (160, 160), "JPEG"),
        ((160, 7), (160, 7), "PNG"),
        ((32, 20), (160, 100), "PNG"),
        ((1, 1), (160, 160), "PNG"),
    ],
)
def test_thumbnail(size, expected, format):
    image = opened(thumbnail(Image.new("L", size, 200), "grey"))
    assert (image.size, image.format, image.mode) == (expected, format, "RGB")
    assert max(image.size) == THUMBNAIL and abs(image.getpixel((0, 0))[1] - 200) <= 2


@pytest.mark.parametrize("size", [(8, 8), (400, 300)])
def test_a_thumbnail_does_not_say_where_it_was_taken(size):
    exif = Image.Exif()
    exif[0x010E] = "at home"  # ImageDescription
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "png", exif=exif, icc_profile=b"profile" * 100)
    image = Image.open(file)
    image.load()
    assert image.getexif() and image.info["icc_profile"]
    found = opened(thumbnail(image, ""))
    assert not found.getexif() and not {"exif", "icc_profile"} & found.info.keys()
    assert image.getexif() and image.size == size  # the image itself stays as it is


def test_magnified_pixels_stay_sharp():
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    found = np.asarray(opened(thumbnail(Image.fromarray(pixels), "")))
    assert (found == pixels.repeat(4, 0).repeat(4, 1)).all()


# --------------------------------------------------------------------------------------------------- HTML

VOID = {"meta", "img"}


class Outline(HTMLParser):
    """The page's elements; raises where tags are not balanced, attributes repeated or ids not unique."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        raise AssertionError(f"<{tag}/>")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.mark.parametrize("name", SECTIONS)
def test_html(pages, name):
    outline = Outline((pages / name).read_text(encoding="utf-8"))
    assert outline.all("script", "link", "iframe", "object", "form") == []
    assert len(outline.all("main")) == len(outline.all("h1")) == 1 and outline.all("html") == [{"lang": "en"}]
    for attributes in outline.all("img"):
        assert attributes.keys() == {"src", "width", "height", "alt"}
        assert attributes["alt"] and attributes["src"].startswith("data:image/")
    targets = {attributes["href"].removeprefix("#") for attributes in outline.all("a")}
    assert targets == {attributes["id"] for attributes in outline.all("section")}
    assert all({"scope"} == attributes.keys() for attributes in outline.all("th"))
    assert len(outline.all("table")) == len(outline.all("caption")) == (6 if name == "report.html" else 0)
    text = "".join(outline.text)
    for said in (NASTY, IDS[2], "<b>none</b>", 'run/"best"', "x" * 290 + "…"):
        assert said in text
    assert "x" * 300 not in text
    style = re.search(r"<style>(.*?)</style>", (pages / name).read_text(encoding="utf-8"), re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style


def test_the_order_of_a_section_is_that_of_its_fields(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "figure.png")
    items = [Item("query", ["said"], [("n", "1")], matches=[Item("found", right=True), Item("other", right=False)])]
    table = Table("a table", ("x", "y"), [("1", "2")], [("sum", "3")])
    figures = [("a figure", tmp_path / "figure.png")]
    grid = [Item("a <b>", ["there"], [("m", "2")], words=[("a", 0.5), ("<b>", 1.0)])]
    section = Section("a section", ["text"], [("fact", "so")], figures, [table], [("group", items)], ["careful"], grid)
    path = write_page(tmp_path / "page.html", "a page", [section])
    text = " ".join("".join(Outline(path.read_text(encoding="utf-8")).text).split())
    parts = ["a section", "careful", "text", "fact", "so", "a figure", "a table", "x", "y", "1", "2", "sum", "3"]
    parts += ["group", "query", "said", "n", "1", "✓ right", "found", "✗ wrong", "other"]
    parts += ["a", "<b>", "there", "m", "2", "Written by fastprob"]
    assert re.search(".*".join(map(re.escape, parts)), text)
    shades = [a["style"] for a in Outline(path.read_text(encoding="utf-8")).all("span")]
    assert shades == ["background: rgb(255 122 26 / 0.35)", "background: rgb(255 122 26 / 0.70)"]
    again = write_page(tmp_path / "again.html", "a page", [section])
    assert again.read_bytes() == path.read_bytes()
    lone = write_page(tmp_path / "lone.html", "\ud800", [])  # half of a surrogate pair is no text
    assert "<h1>?</h1>" in lone.read_text(encoding="utf-8")


def test_the_verdict_warns_of_inverted_directions_alone(tmp_path, store, model):
    report = evaluate_store(model, store, passes=0, levels=4)
    for found, s, said in (
        ("image_to_text", float("nan"), "image → text has the same recall@1 in every level, "),
        ("image_to_text", 0.4, "image → text has no clear order (S +0.40)"),
        ("image_to_text", 0.8, "image → text is inverted: the more"),
        ("text_to_image", -0.9, "as it should be"),
    ):
        object.__setattr__(getattr(report.evaluation, found), "spearman", s)
        path = write_report_page(report, store, tmp_path / "report.html")
        assert said in path.read_text(encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    (warning,) = re.findall('<p class="warning">(.*?)</p>', text)
    assert "image → text is inverted" in warning and "(S +0.80)" in warning and text.count("image → text is") == 1
    assert "text → image is as it should be: the more uncertain a query, the less often it is right (S -0.90)" in text
    assert "Figures" not in text and "--data" in text and "<img" not in text
    with pytest.raises(ValueError, match="write_report_page: shown must be at least 1, got 0"):
        write_report_page(report, store, tmp_path / "none.html", shown=0)


# -------------------------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def tab():
    if browser.PATH is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is on the PATH")
    with browser.opened() as tab:
        yield tab


@pytest.mark.parametrize("name", SECTIONS)
def test_in_a_browser(tab, pages, name):
    tab.open(pages / name)
    headings = tab.evaluate("[...document.querySelectorAll('section > h2')].map(each => each.textContent)")
    assert headings == SECTIONS[name]
    sizes = tab.evaluate("Promise.all([...document.images].map(each => each.decode().then(() => each.naturalWidth)))")
    count = 20 + 33 + 33 * 3 + (2 if name == "report.html" else 0)  # the images, the texts' own and matches, figures
    assert len(sizes) == count and min(sizes) > 0
    text = tab.evaluate("document.body.textContent")
    assert NASTY in text and IDS[2] in text
    assert tab.evaluate("document.scripts.length") == 0 and tab.named("Page.javascriptDialogOpening") == []
    asked = {sent["request"]["url"].split(":")[0] for sent in tab.named("Network.requestWillBeSent")}
    assert asked == {"file", "data"} and tab.named("Network.loadingFailed", "Log.entryAdded") == []


def test_a_browser_refuses_what_a_page_should_not_ask_for(tab, pages, tmp_path):
    """The test above sees requests and scripts, and the page's own policy stops them."""
    asking = '<img src="https://example.org/x.png"><script>document.title = "run"</script></main>'
    changed = (pages / "index.html").read_text(encoding="utf-8").replace("</main>", asking)
    (tmp_path / "page.html").write_text(changed, encoding="utf-8")
    tab.open(tmp_path / "page.html")
    assert tab.evaluate("document.title") != "run" and tab.evaluate("document.scripts.length") == 1
    refused = [entry["entry"]["text"] for entry in tab.named("Log.entryAdded")]
    assert len(refused) == 2 and all("Content Security Policy" in text for text in refused)


CONTRAST = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = colour => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); return canvas.getImageData(0, 0, 1, 1).data; };
  const light = colour => [...rgb(colour)].slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    const colour = getComputedStyle(element).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" && element.parentElement ? behind(element.parentElement) : colour; };
  const texts = [...document.body.querySelectorAll("*")].filter(
    each => [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  const ratios = texts.map(each => {
    const [low, high] = [light(getComputedStyle(each).color), light(behind(each))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05); });
  return [ratios.length, Math.min(...ratios), light(behind(document.body))];
})()
"""


BROKEN = """
[...document.querySelectorAll("td")].filter(each => /^[0-9.,]+$/.test(each.textContent)).filter(each => {
  const range = document.createRange();
  range.selectNodeContents(each);
  return range.getClientRects().length > 1; }).map(each => each.textContent)
"""  # numbers of a table that are on several lines


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 400, 768, 1200])
def test_readable_on_screens(tab, pages, width, colours):
    """Nothing stands out to the side, and every text has the contrast that WCAG 2.1 asks for, 4.5 at least."""
    tab.show(width, colours)
    tab.open(pages / "report.html")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    over = (
        "[...document.querySelectorAll('body *')].filter(each => each.getBoundingClientRect().right > innerWidth + 0.5)"
    )
    assert tab.evaluate(f"{over}.map(each => each.outerHTML.slice(0, 80))") == []
    assert tab.evaluate(BROKEN) == []
    count, contrast, paper = tab.evaluate(CONTRAST)
    assert count > 500 and contrast >= 4.5
    assert paper > 0.9 if colours == "light" else paper < 0.05
