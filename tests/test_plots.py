"""Sheets against naive loops; the report: complete, escaped, and without an address outside it."""
import collections
import dataclasses
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, answer
from PIL import Image

import data
import evaluate
import model as models
from support import testsets
from tokenizer import Tokenizer
from tools import plots

HOSTILE = '<script>alert("x")</script> & </td> é 漢字'
VOCABULARY = Tokenizer.train(["a red star above a blue circle"] * 9, 600)
MERGES = [" ".join(pair) for pair in VOCABULARY.merges]


def save_run(folder, method="maskclip", **config):
    """A run's last.pt with random weights, and its log of 20 lines.  -> folder"""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = models.build(dataclasses.replace(SMALL, method=method, vocab_size=len(VOCABULARY)))
    torch.nn.init.normal_(model.visual.pos_embed)  # fresh features are all alike
    torch.save(dict(model=model.state_dict(), model_config=dataclasses.asdict(model.config),
                    tokenizer=MERGES, config=dict(data=["world"], mask_ratio=0.6) | config,
                    made_by=[dict(commit="first"), dict(commit="newest")]), folder / "last.pt")
    lines = [json.dumps(dict(step=i, image=4 / i, text=None if i == 3 else 5 / i, skipped=0)) + "\n"
             for i in range(1, 21)]
    (folder / "log.jsonl").write_text("".join(lines) + '{"step": 21, "ima')  # it was killed
    return folder


def retrieval_set(folder):
    """Five pictures of two texts each.  -> folder"""
    (folder / "images").mkdir(parents=True)
    images = []
    for i, colour in enumerate(("red", "green", "blue", "grey", "white")):
        Image.new("RGB", (40, 40), colour).save(folder / "images" / f"{i}.png")
        sentences = [dict(raw=f"a {colour} {i}"), dict(raw=f"{colour} {i}")]
        images.append(dict(filename=f"{i}.png", split="test", sentences=sentences))
    (folder / "karpathy.json").write_text(json.dumps(dict(images=images)))
    return folder


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A model, its tokenizer, a retrieval set; sheets are returned as (title, rows)."""
    monkeypatch.setattr(plots, "sheet", lambda title, rows: (title, rows))
    model, tokenizer = evaluate.load_model(save_run(tmp_path) / "last.pt")
    folder = retrieval_set(tmp_path / "val")
    return model, tokenizer, folder, *testsets.karpathy(folder)


def pixels(model, paths):
    """Pictures as the model sees them in an evaluation."""
    view = evaluate.evaluation_view(model.config)
    return data.normalize(torch.stack([torch.tensor(np.array(view(Image.open(path))))
                                       for path in paths]))


def test_the_mask_covers_exactly_the_hidden_patches(world):
    _, [[_, (_, block), (_, random)]] = plots.mask_sheet(world[3][:1], 4, 0.6)  # a red picture
    for picture, mask in ((block, data.block_mask((4, 4), 0.6, np.random.default_rng(0))),
                          (random, data.random_mask(16, 0.6, np.random.default_rng(0)))):
        hidden = np.kron(mask.reshape(4, 4), np.ones((56, 56)))
        assert (np.array(picture)[:, :, 1] == 200 * hidden).all()  # green


@torch.no_grad()
def test_codewords_are_the_nearest_of_a_loop(world, tmp_path):
    model, *_ = world
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.effect_noise((60, 40), 99).convert("RGB").save(path)
    _, [row] = plots.codeword_sheet(model, paths)
    features = model.visual(pixels(model, paths))[:, 1:].flatten(0, 1)
    ids = F.cosine_similarity(features[:, None], model.codewords.weight, dim=2).argmax(1).tolist()
    counts = collections.Counter(ids)
    frequent = sorted(counts, key=lambda number: (-counts[number], number))[:8]
    drawn = np.stack([np.array(picture)[::56, ::56] for _, picture in row[1::2]])  # 4 x 4 patches
    colours = dict(zip(frequent, plots.OKABE_ITO))
    for number, colour in zip(ids, drawn.reshape(-1, 3).tolist(), strict=True):
        assert bytes(colour).hex() == colours.get(number, "#c8c8c8")[1:]


@torch.no_grad()
def test_word_maps_are_similarities_less_those_of_an_empty_text(world):
    model, tokenizer, _, paths, *_ = world
    patches = model.encode_patches(pixels(model, paths[:1]))[0]
    words = ["red star", "x"]
    classifier = evaluate.zeroshot_classifier(model, tokenizer, [*words, ""], ["{}", "a {}"])
    cosines = F.cosine_similarity(classifier[:, None], patches, dim=2).numpy()
    maps = plots.word_maps(model, tokenizer, paths[0], words)
    assert np.allclose(maps.reshape(2, -1), cosines[:2] - cosines[2], atol=1e-5)
    caption = "A small red star, above the red star; by a dog's x."  # each phrase once
    _, [_, row] = plots.heatmap(model, tokenizer, [(paths[0], caption)])
    assert [name for name, _ in row] == ["0.png", "red star", "dog's x"]


@torch.no_grad()
def test_neighbours_are_those_of_a_loop(world):
    model, tokenizer, folder, paths, texts, picture_of_text = world
    _, rows = plots.neighbour_sheet(model, tokenizer, folder)
    images = model.encode_image(pixels(model, paths))
    sentences = [model.encode_text(tokenizer([text], 40))[0] for text in texts]
    similarity = F.normalize(images, dim=1) @ F.normalize(torch.stack(sentences), dim=1).T
    lines = iter(rows)
    for text in (0, 2, 4, 6, 9):  # of ten
        picture = picture_of_text[text]
        assert texts[text] in next(lines)
        scores = [similarity[picture, text], *similarity[:, text].sort(descending=True).values]
        assert [caption for caption, _ in next(lines)] == [f"{score:.2f}" for score in scores]
        for i in sorted(range(10), key=lambda i: -similarity[picture, i])[:5]:
            assert next(lines) == f"{similarity[picture, i]:.2f}  {texts[i]}"


@pytest.mark.parametrize("words,key", [
    (["heatmap", "A", "a the"], "word"), (["heatmap", "A"], "after the picture"),
    (["heatmap", "A", "red", "--checkpoint", "MAE"], "text encoder"),
    (["codewords", "A", "--checkpoint", "MAE"], "codewords"), (["masks", "MAE"], "last.pt"),
    (["neighbours", "nowhere"], "nowhere"), (["report", "nowhere"], "last.pt")])
def test_one_sentence_and_nothing_is_overwritten(words, key, tmp_path, monkeypatch, capsys):
    paths = dict(A=retrieval_set(tmp_path / "val") / "images/0.png",
                 MAE=save_run(tmp_path / "mae", "mae") / "last.pt")
    out = tmp_path / "out.png"
    out.write_text("kept")
    options = ["--checkpoint", save_run(tmp_path / "run") / "last.pt", "--out", out]
    words = [*options, *(paths.get(word, word) for word in words)]
    assert key in answer(plots.main, words, monkeypatch, capsys)
    assert out.read_text() == "kept"


def test_the_report_holds_scores_settings_curves_and_pictures(tmp_path):
    retrieval_set(tmp_path / "world/val")
    run = save_run(tmp_path / "run", out=HOSTILE)
    model, _ = evaluate.load_model(run / "last.pt")
    result = dict(scores={"i2t R@1": 0.4321}, chance=0.001, over="9 pictures", protocol={})
    evaluate.append_result(run / "last.pt", model, "retrieval flickr30k", result)
    evaluate.append_result(run / "last.pt", model, "linear old", result, sha256="other weights")
    other = save_run(tmp_path / "other", "mae", data=["nowhere"])
    plots.report([run, other], tmp_path / "report.html", tmp_path)
    page = ElementTree.fromstring((tmp_path / "report.html").read_text("utf-8"))  # closed XML
    text = "\n".join(page.itertext())
    assert re.search(r"flickr30k +i2t R@1 +43.2 +70.1", text)  # 70.1: the paper's
    assert "linear old" not in text
    for part in ("newest", json.dumps(HOSTILE), "No pictures"):  # `other` has no test set
        assert part in text
    assert len(page.findall(".//img")) == 3  # word maps, masks, codewords
    curves = ElementTree.parse(tmp_path / "curves.svg").findall(".//{*}polyline")
    assert {len(line.get("points").split()) for line in curves} == {20, 19}
