"""Contact sheets against naive loops, and the report: whole, escaped, without network, in a real browser too."""
import base64
import collections
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_evaluate import Oracle, paint
from test_model import SMALL
from test_train import answer, small

import data
import evaluate
import model as models
import train
from downstream import pictures

HOSTILE = '<script>alert("x")</script> & </td> \'" é 漢字'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Not where a user may have drawn the demo into data/."""
    monkeypatch.chdir(tmp_path)


def save_run(folder, method="maskclip", **changes):
    """A last.pt as train.py writes it, with fresh weights.  -> model"""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = models.build(dataclasses.replace(SMALL, method=method, vocab_size=600)).eval()
    config = train.resolve(dict(data=["demo"], method=method) | changes)
    torch.save(dict(model=model.state_dict(), model_config=dataclasses.asdict(model.config), tokenizer=MERGES, step=16,
                    config=dataclasses.asdict(config), made_by=dict(commit="abc", torch="2"), pairs="64 pairs, 0"),
               folder / "last.pt")
    return model


MERGES = [" ".join(pair) for pair in evaluate.Tokenizer.train(["a red star above a blue circle"] * 9, 600).merges]


@pytest.fixture
def run_folder(tmp_path):
    """A run with a log and results.  -> folder"""
    folder = tmp_path / "runs/one"
    save_run(folder)
    write_log(folder)
    record = dict(sha256=evaluate.Cache(folder / "last.pt").sha256, task="retrieval flickr30k",
                  scores={"i2t R@1": 0.4321, "t2i R@1": 0.2109}, chance=0.001, protocol=dict(pictures=1000, texts=5000))
    (folder / "results.json").write_text(json.dumps([record, record | dict(sha256="other", task="linear old")]))
    return folder


def write_log(folder, count=200):
    lines = [dict(step=10 * i, epoch=i / count, image=4 / (1 + i), text=5 / (1 + i), lr=1e-3, skipped=0, bad=3,
                  pictures_per_s=100 + i, memory_gib=1.5, data_wait=0.25) for i in range(1, count + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def retrieval_set(folder, colours=("red", "green", "blue", "red", "green", "blue", "red")):
    images = []
    for i, colour in enumerate(colours):
        paint(folder / "images" / f"{i}.png", colour)
        images.append(dict(filename=f"{i}.png", split="test", sentences=[dict(raw=f"a {colour}"), dict(raw=colour)]))
    (folder / "karpathy.json").write_text(json.dumps(dict(images=images)))
    return folder


def at_patches(picture, grid):
    """The pixels of each patch but its edges, (rows, columns, h, w, 3)."""
    pixels = np.array(picture).astype(int)
    h, w = pixels.shape[0] // grid, pixels.shape[1] // grid
    return pixels.reshape(grid, h, grid, w, 3).swapaxes(1, 2)[:, :, 2:-2, 2:-2]


@pytest.fixture
def cells(monkeypatch):
    """What sheets are made of, before they are joined: drawn.rows, drawn.title."""
    drawn, plain = SimpleNamespace(), pictures.sheet

    def sheet(title, rows, legend=None):
        drawn.title, drawn.rows = title, rows
        return plain(title, rows, legend)
    monkeypatch.setattr(pictures, "sheet", sheet)
    return drawn


# ---------------------------------------------------------------- sheets

@pytest.mark.parametrize("trained", ["block", "random"])
def test_hidden_patches_are_exactly_those_of_the_mask(cells, trained):
    config, image = SimpleNamespace(grid=7, method="maskclip"), Image.new("RGB", (90, 50), (200, 30, 30))
    evaluate.mask_sheet([("a.png", image)], config, dict(mask=trained, mask_ratio=0.6))
    assert cells.title == f"Masks of 60 % of 7 x 7 patches; this run trains with {trained} masks"
    (name, picture), block, drawn, seen = cells.rows[0]
    evaluate.mask_sheet([("a.png", image)], SimpleNamespace(grid=7, method="clip"), dict(mask=trained, mask_ratio=0.6))
    assert cells.title == "Masks of 60 % of 7 x 7 patches"  # nothing was hidden from it
    masks = dict(block=data.block_mask((7, 7), 0.6, np.random.default_rng(0)).reshape(7, 7),
                 random=data.random_mask(49, 0.6, np.random.default_rng(0)).reshape(7, 7))
    assert name == "a.png" and picture.size == (224, 224)
    for (caption, shown), mask in ((block, masks["block"]), (drawn, masks["random"]), (seen, masks[trained])):
        assert ("20 of 49" if caption.startswith("the student sees") else "29 of 49 hidden") in caption
        patches = at_patches(shown, 7)
        red = (patches == (200, 30, 30)).all((2, 3, 4))
        grey = (patches.max(-1) == patches.min(-1)).all((2, 3))
        assert red.tolist() == (~mask).tolist() and grey.tolist() == mask.tolist()


def test_codeword_colours_follow_the_argmax(cells):
    torch.manual_seed(0)
    model = models.build(dataclasses.replace(SMALL, method="maskclip", codewords=23)).eval()
    with torch.no_grad():  # fresh features are all alike
        model.visual.pos_embed.normal_()
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 60, 3), np.uint8)) for i in range(4)]
    sheet = evaluate.codeword_sheet(model, [(f"{i}.png", image) for i, image in enumerate(images)])
    grid, ids = model.config.grid, []
    for image in images:
        pixels = np.array(data.center_crop(image, model.config.image_size))
        x = model.visual(data.normalize(torch.from_numpy(pixels)[None]))[0, 1:]
        for feature in x:
            cosines = [F.cosine_similarity(feature, word, dim=0).item() for word in model.codewords.weight]
            ids.append(int(np.argmax(cosines)))
    counts = collections.Counter(ids)
    assert len(counts) > 9  # else nothing is grey
    order = sorted(counts, key=lambda k: (-counts[k], k))
    colours = {k: pictures.OKABE_ITO[i] if i < 8 else pictures.GREY for i, k in enumerate(order)}
    assert f"{len(counts)} of 23 occur in 4 pictures" in cells.title
    for i, (caption, patches) in enumerate(sum(cells.rows, [])[1::2]):
        own = ids[i * grid ** 2:(i + 1) * grid ** 2]
        assert caption == f"{len(set(own))} codeword{'s' * (len(set(own)) > 1)} in {grid ** 2} patches"
        shown = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in at_patches(patches, grid)[:, :, 0, 0].reshape(-1, 3).tolist()]
        assert shown == [colours[k] for k in own]
    assert sheet.width == 6 * (224 // grid * grid + 8) + 8
    with pytest.raises(ValueError, match="--codewords needs a MaskCLIP checkpoint: clip has no codewords"):
        evaluate.codeword_sheet(models.build(dataclasses.replace(SMALL, method="clip")), [("a", images[0])])


def test_labels_and_guesses_have_the_colours_of_their_classes():
    labels = np.full((20, 20), 255, np.uint8)
    labels[:10], labels[10:, :10] = 1, 0
    guess = np.ones((20, 20), int)
    example = "a", Image.new("RGB", (20, 20), "red"), labels, guess
    sheet = np.asarray(pictures.label_sheet("title", [example], ["sky", "sea"], 200))
    sea, sky = (tuple(bytes.fromhex(pictures.OKABE_ITO[i][1:])) for i in (0, 1))  # the most frequent first

    def pixels(colour, left):
        return (sheet[:280, left:left + 200] == colour).all(2).sum()
    assert 0.8 * 20000 < pixels(sea, 216) <= 20000 and 0.7 * 10000 < pixels(sky, 216) <= 10000
    assert 0.8 * 30000 < pixels(sea, 424) <= 30000 and pixels(sky, 424) == 0  # of the labelled three quarters
    none = pictures.label_sheet("title", [("a", Image.new("RGB", (20, 9)), np.full((9, 20), 255), guess[:9])], ["sky"])
    assert none.width > 500


def test_neighbours_are_those_of_a_loop_and_right_ones_are_framed(tmp_path, monkeypatch):
    folder, seen = retrieval_set(tmp_path / "mine"), {}
    plain = pictures.neighbour_sheet

    def sheet(title, searches, side):
        seen.update(searches)
        return plain(title, searches, side)
    monkeypatch.setattr(pictures, "neighbour_sheet", sheet)
    model = Oracle()
    drawn = evaluate.neighbour_sheet(model, model.tokenizer, folder, side=160, queries=3, k=4)
    paths, texts, owners = data.karpathy(folder)
    model.requires_grad_(False)
    images = F.normalize(torch.stack([model.encode_image(data.normalize(torch.from_numpy(np.array(Image.open(path)))
                                                                        )[None])[0] for path in paths]), dim=1)
    words = F.normalize(torch.stack([model.encode_text(model.tokenizer(text, 8))[0] for text in texts]), dim=1)
    by_text, by_picture = seen.values()
    for (caption, query, nearest), i in zip(by_text, (0, 6, 13), strict=True):  # the first, the middle, the last
        similarity = [float(image @ words[i]) for image in images]
        own = similarity[owners[i]]
        assert caption == f"text {i + 1}: rank {sum(s >= own for s in similarity)}" and query == texts[i]
        assert [s for s, _, _ in nearest] == pytest.approx(sorted(similarity, reverse=True)[:4])
        for s, found, right in nearest:  # the true picture is one of several of its colour
            at = [n for n, path in enumerate(paths) if np.array_equal(
                np.array(data.center_crop(Image.open(path), 160)), np.array(found)) and abs(similarity[n] - s) < 1e-6]
            assert at and (not right or owners[i] in at)
        assert sum(right for *_, right in nearest) <= 1
    for (caption, _, nearest), i in zip(by_picture, (0, 3, 6), strict=True):
        assert [right for _, text, right in nearest if text not in (texts[2 * i], texts[2 * i + 1])] == []
        assert all(isinstance(text, str) for _, text, _ in nearest)
    framed = sum(right for queries in seen.values() for *_, nearest in queries for *_, right in nearest)
    green = (np.array(drawn) == tuple(bytes.fromhex(pictures.OKABE_ITO[2][1:]))).all(-1)
    starts = green[:, 1:-1] & ~green[:, :-2]  # a frame's upper edge is one run of 160 green pixels
    assert framed > 0 and sum(green[y, x:x + 160].all() and not green[y - 1, x] for y, x in np.argwhere(starts) + (0, 1)
                              ) == framed


def test_a_folder_has_a_row_for_each_of_its_first_pictures(tmp_path, cells, monkeypatch):
    for i in range(13):
        paint(tmp_path / "many" / f"{i:02}.png", "red", "blue")
    monkeypatch.setattr(evaluate, "load_model", lambda path: (Oracle(), Oracle().tokenizer))
    args = SimpleNamespace(checkpoint=["x"], output=str(tmp_path / "map.png"), root="",
                           heatmap=[str(tmp_path / "many"), "a red and a blue"])
    evaluate.draw(args, "heatmap")
    assert cells.title == "a red and a blue (the first 12 of 13 pictures)" and len(cells.rows) == 12
    assert [row[0][0] for row in cells.rows] == [f"{i:02}.png" for i in range(12)]
    assert Image.open(tmp_path / "map.png").width == 3 * 232 + 8


@pytest.mark.parametrize("words", ["", "short", "a long caption " * 40, "x" * 500, "Ein Bär, 漢字, слон 🙂", HOSTILE])
def test_words_stay_within_their_width(words):
    face = pictures.font(16, words)
    lines = pictures.wrapped(words, face, 150)
    assert "".join("".join(lines).split()) == "".join(words.split())
    assert all(face.getlength(line) <= 150 for line in lines)
    image = pictures.sheet(words, [words, [(words, Image.new("RGB", (160, 160))), (words, pictures.card(words, 160))]])
    assert image.width == 454 + 16
    assert (np.array(image)[:, :8] == 255).all() and (np.array(image)[:, -8:] == 255).all()  # nothing in the margin


@pytest.mark.parametrize("size", [(1, 1), (600, 30), (30, 600)])
def test_pictures_of_odd_shapes(size, cells):
    model = models.build(dataclasses.replace(SMALL, method="maskclip")).eval()
    named = [("panorama.png", Image.new("RGB", size, "red"))]
    for sheet in (evaluate.mask_sheet(named, model.config, {}), evaluate.codeword_sheet(model, named)):
        assert sheet.width >= 454 and len({picture.size for _, picture in cells.rows[0]}) == 1


@pytest.mark.parametrize("words,why", [
    (["--heatmap", "EMPTY", "a red"], "no pictures in the folder"),
    (["--masks", "none.png"], "cannot read the picture none.png"),
    (["--codewords", "A.png", "TEXT"], "cannot read the picture"),
    (["--heatmap", "A.png", "a red", "--checkpoint", "MAE"], "--heatmap needs a text encoder, and "),
    (["--neighbours", "EMPTY", "--checkpoint", "MAE"], "--neighbours needs a text encoder, and "),
    (["--neighbours", "EMPTY"], "no karpathy.json"), (["--neighbours", "nowhere"], "no test set 'nowhere'"),
    (["--codewords", "A.png", "--checkpoint", "MAE"], "needs a MaskCLIP checkpoint: mae has no codewords"),
    (["--masks", "A.png", "--codewords", "A.png", "--output", "OUT"], "--output names one file"),
    (["--report", "EMPTY"], "is no run: it has neither last.pt nor log.jsonl"), (["--report", "nowhere"], "is no run")])
def test_one_sentence_and_nothing_overwritten(words, why, tmp_path, monkeypatch, capsys):
    save_run(tmp_path / "run")
    save_run(tmp_path / "mae", "mae")
    paint(tmp_path / "a.png", "red")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "out.png").write_text("kept")
    places = {"EMPTY": "empty", "A.png": "a.png", "TEXT": "text.png", "MAE": "mae/last.pt", "OUT": "out.png"}
    words = [tmp_path / places[word] if word in places else word for word in words]
    words += [] if "--checkpoint" in words else ["--checkpoint", tmp_path / "run/last.pt"]
    words += [] if "--output" in words else ["--output", tmp_path / "out.png"]
    monkeypatch.chdir(tmp_path)
    assert why in answer(evaluate.main, words, monkeypatch, capsys)
    assert (tmp_path / "out.png").read_text() == "kept"


# ---------------------------------------------------------------- the report

class Whole(HTMLParser):
    """Checks that what is opened is closed in order; collects words and what names another place."""
    void = ("meta", "img", "br", "!doctype")

    def __init__(self, html):
        super().__init__()
        self.open, self.words, self.places, self.tags = [], [], [], collections.Counter()
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        assert len(dict(attrs)) == len(attrs)
        self.places += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open = self.open[:-1] if tag not in self.void else self.open

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)


def read_report(path):
    """The report's text, after all that must hold for any.  -> html, words"""
    html = path.read_text("utf-8")
    page = Whole(html)
    assert all(place.startswith("data:image/png;base64,") for place in page.places)
    for place in page.places:
        Image.open(io.BytesIO(base64.b64decode(place.partition(",")[2]))).verify()
    assert not re.search(r"url\(|@import|<script|<link|<iframe", html)
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        ElementTree.fromstring(svg)
        assert svg.count('class="at"') <= 60 and "nan" not in svg
    assert html.count("--c7:") == 2  # the colours of curves, light and dark
    assert len(html) < 1e6 and '<meta name="viewport"' in html and "prefers-color-scheme" in html
    return html, page.words


def test_the_report_holds_scores_settings_and_the_paper(run_folder, tmp_path):
    evaluate.report([run_folder], tmp_path / "report.html", root=tmp_path)
    html, words = read_report(tmp_path / "report.html")
    assert {"one", "43.2", "21.1", "70.1", "45.6", "0.1", "1,000 pictures, 5,000 texts"} <= set(words)  # 70.1: paper's
    assert not {"linear old"} & set(words)  # of other weights
    state = evaluate.read_checkpoint(run_folder / "last.pt")
    for name, value in state["config"].items():
        assert name in words and (not str(value) or (value[0] if name == "data" else str(value)) in words), name
    assert {"maskclip", "abc", "1.50 GiB", "25.0%", "3", "2,000"} <= set(words)
    assert html.count("<svg") == 4 and 'step 2,000: image 0.0199  text 0.02488' in html


def test_several_runs_stand_side_by_side(run_folder, tmp_path):
    save_run(tmp_path / "runs/two", "clip", lr=0.125)
    write_log(tmp_path / "runs/two", 100)
    save_run(tmp_path / "runs/three", "mae")  # no log, no results, no text
    (tmp_path / "runs/four").mkdir()
    write_log(tmp_path / "runs/four")  # cut off before the first checkpoint, and in the middle of a line
    with open(tmp_path / "runs/four/log.jsonl", "a") as file:
        file.write('{"step": 2010, "ima')
    folders = [tmp_path / "runs" / name for name in ("one", "two", "three", "four")]
    evaluate.report(folders, tmp_path / "report.html", root=tmp_path)
    html, words = read_report(tmp_path / "report.html")
    assert "4 runs compared" in words and "four has no last.pt yet: its log is all there is." in " ".join(words)
    rows = {re.sub("<.*?>", "", row[0]): re.findall("<td>(.*?)</td>", row[1]) for row in re.findall(
        '<tr[^>]*><th scope="row">(.*?)</th>(.*?)</tr>', html)}
    assert rows["&ne; lr"] == ["0.001", "0.125", "0.001", "-"] and rows["seed"] == ["0", "0", "0", "-"]
    image = next(svg for svg in re.findall("<svg.*?</svg>", html, re.S) if "contrastive loss: image" in svg)
    assert image.count("<polyline") == 3 and "step 10: A 2  B 2  D 2<" in image
    assert "step 2,000: A 0.0199  D 0.0199<" in image  # B ended before


@pytest.mark.parametrize("method", ["clip", "mae"])
def test_a_run_without_results_or_log(method, tmp_path):
    save_run(tmp_path / "run", method)
    evaluate.report([tmp_path / "run"], tmp_path / "report.html")
    html, words = read_report(tmp_path / "report.html")
    assert "<svg" not in html and "<img" not in html and method in words
    assert "log.jsonl has no lines yet." in words and any("Nothing was evaluated yet" in word for word in words)


def test_one_task_by_two_protocols_has_two_rows(run_folder, tmp_path):
    record = json.loads((run_folder / "results.json").read_text())[0] | dict(task="linear x", scores={"top-1": 0.75})
    records = [record | dict(protocol=dict(place="a", features="cls")), record | dict(
        scores={"top-1": 0.5}, protocol=dict(place="b", features="both"))]
    (run_folder / "results.json").write_text(json.dumps(records))
    evaluate.report([run_folder], tmp_path / "report.html", root=tmp_path)
    assert {"linear x", "75.0", "linear x (features both)", "50.0"} <= set(read_report(tmp_path / "report.html")[1])


def test_damaged_pictures_leave_the_numbers(run_folder, tmp_path):
    retrieval_set(tmp_path / "demo/val")
    (tmp_path / "demo/val/images/0.png").write_text("damaged")
    evaluate.report([run_folder], tmp_path / "report.html", root=tmp_path)
    html, words = read_report(tmp_path / "report.html")
    assert any(word.startswith("No pictures: cannot read the picture") for word in words) and "43.2" in words


def test_hostile_words_are_escaped(tmp_path):
    run = dict(name=HOSTILE, about={HOSTILE: HOSTILE}, config={HOSTILE: HOSTILE}, log=[dict(step=1, image=1.0)],
               scores={HOSTILE: dict(scores={HOSTILE: 0.5}, chance=None, over=HOSTILE)}, paper={}, remarks=[HOSTILE],
               sheets=[(HOSTILE, Image.new("RGB", (9, 9)))])
    for runs in ([run], [run, run]):
        pictures.report(runs, tmp_path / "report.html")
        html, words = read_report(tmp_path / "report.html")
        assert sum(HOSTILE in word for word in words) >= 9 and "<script" not in html


def test_training_ends_with_scores_and_a_report(tmp_path, monkeypatch, capsys):
    (tmp_path / "world/train").mkdir(parents=True)
    data._draw_shard(tmp_path / "world/train", 0, 64, 0)
    retrieval_set(tmp_path / "world/val")
    config = small(tmp_path / "world/train", tmp_path / "run", steps=0)
    train.run(config)
    record, = json.loads((tmp_path / "run/results.json").read_text())
    assert record["task"] == "retrieval world" and record["checkpoint"] == "last.pt"
    html, words = read_report(tmp_path / "run/report.html")
    assert f"{100 * record['scores']['i2t R@5']:.1f}" in words and html.count("<img") == 3  # words, masks, codewords
    assert "report.html" in capsys.readouterr().out

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(pictures, "report", full)
    train.run(dataclasses.replace(config, out=str(tmp_path / "again")))
    assert "warning: " in capsys.readouterr().out and (tmp_path / "again/last.pt").is_file()


class Browser:
    """Headless Chromium, driven over two pipes by its DevTools protocol."""

    def __init__(self, program, home):
        there, self.to = os.pipe()
        self.back, answers = os.pipe()
        shell = (f'exec "{program}" --headless --no-sandbox --disable-gpu --remote-debugging-pipe '
                 f'--user-data-dir="{home}" 3<&{there} 4>&{answers}')  # it reads from 3 and writes to 4
        self.process = subprocess.Popen(["bash", "-c", shell], pass_fds=(there, answers), stderr=subprocess.DEVNULL)
        os.close(there), os.close(answers)
        self.buffer, self.count, self.session, self.events = b"", 0, {}, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = dict(sessionId=self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Log", "Runtime", "Network"):
            self(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.buffer:
            part = os.read(self.back, 2 ** 20)
            assert part, "Chromium ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def __call__(self, method, **params):
        self.count += 1
        os.write(self.to, json.dumps(dict(id=self.count, method=method, params=params) | self.session).encode() + b"\0")
        while (message := self.message()).get("id") != self.count:
            self.events.append(message)
        return message["result"]

    def open(self, path, width, dark):
        """-> size of the page, what was said on the console, addresses that were asked for"""
        self("Emulation.setScriptExecutionDisabled", value=True)
        self("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=dark)])
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())
        said = [event for event in self.events if event["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled",
                                                                      "Runtime.exceptionThrown")]
        asked = [event["params"]["request"]["url"] for event in self.events
                 if event["method"] == "Network.requestWillBeSent"]
        return self("Page.getLayoutMetrics")["cssContentSize"], said, asked


@pytest.mark.slow
def test_the_report_in_a_browser(run_folder, tmp_path):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no Chromium")
    retrieval_set(tmp_path / "demo/val")
    save_run(tmp_path / "runs/two", "clip", lr=0.125)
    evaluate.report([run_folder], tmp_path / "one.html", root=tmp_path)
    evaluate.report([run_folder, tmp_path / "runs/two"], tmp_path / "two.html", root=tmp_path)
    browser = Browser(program, tmp_path / "home")
    try:
        for name in ("one", "two"):
            for width in (390, 1280):
                for dark in ("light", "dark"):
                    size, said, asked = browser.open(tmp_path / f"{name}.html", width, dark)
                    assert size["width"] <= width and size["height"] > 1000 and said == []
                    assert all(url.startswith(("data:", (tmp_path / f"{name}.html").as_uri())) for url in asked)
        pixels = {dark: browser.open(tmp_path / "one.html", 390, dark) and np.array(Image.open(io.BytesIO(
            base64.b64decode(browser("Page.captureScreenshot")["data"]))).convert("L")).mean()
            for dark in ("light", "dark")}
        assert pixels["light"] > 200 and pixels["dark"] < 60
    finally:
        browser("Browser.close")
        browser.process.wait(30)
