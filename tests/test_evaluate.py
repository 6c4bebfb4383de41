"""Metrics against naive loops and scikit-learn, evaluations on sets whose answer is known, loading, the word map."""
import argparse
import json
import os
import pickle
import socket
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
from tokenizer import Tokenizer

RNG = np.random.default_rng(0)


def with_ties(*shape):
    return torch.from_numpy(RNG.integers(0, 6, shape) / 6)


def test_accuracy_and_mean_per_class_by_hand():
    scores, targets = F.one_hot(torch.tensor([0, 0, 1, 1, 1, 0]), 3), torch.tensor([0, 0, 0, 1, 1, 1])
    assert evaluate.accuracy(scores, targets) == pytest.approx(4 / 6)
    skewed = torch.tensor([0, 0, 0, 0, 1, 1])
    assert evaluate.mean_per_class(scores, skewed) == pytest.approx((2 / 4 + 1 / 2) / 2)  # class 2 does not occur


def test_roc_auc_is_the_share_of_ordered_pairs():
    scores, targets = with_ties(40), torch.from_numpy(RNG.integers(0, 2, 40))
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[targets == 1] for n in scores[targets == 0]]
    assert evaluate.roc_auc(scores, targets) == pytest.approx(np.mean(pairs))
    assert evaluate.roc_auc(torch.stack([-scores, scores], 1), targets) == pytest.approx(np.mean(pairs))


def test_map_11point_equals_a_loop_over_thresholds():
    scores, targets = with_ties(30, 4), torch.from_numpy(RNG.integers(0, 2, (30, 4)))
    total = 0.0
    for c in range(4):
        for level in range(11):
            best = 1.0 if level == 0 else 0.0
            for cut in scores[:, c].unique():
                chosen = scores[:, c] >= cut
                hits = (targets[chosen, c] == 1).sum().item()
                if 10 * hits >= level * targets[:, c].sum().item():
                    best = max(best, hits / chosen.sum().item())
            total += best / 11 / 4
    assert evaluate.map_11point(scores, targets) == pytest.approx(total)


@pytest.mark.peers
def test_metrics_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(5):
        rng = np.random.default_rng(seed)
        scores, targets = torch.from_numpy(rng.random((60, 5))), torch.from_numpy(rng.integers(0, 5, 60))
        assert evaluate.mean_per_class(scores, targets) == pytest.approx(
            metrics.balanced_accuracy_score(targets, scores.argmax(1)))
        ties, binary = torch.from_numpy(rng.integers(0, 6, 60) / 6), torch.from_numpy(rng.integers(0, 2, 60))
        assert evaluate.roc_auc(ties, binary) == pytest.approx(metrics.roc_auc_score(binary, ties))
        precision, recall, _ = metrics.precision_recall_curve(binary, ties)
        expected = np.mean([precision[recall >= level / 10 - 1e-9].max() for level in range(11)])
        assert evaluate.map_11point(ties[:, None], binary[:, None]) == pytest.approx(expected)


def test_recall_equals_a_loop_with_one_to_seven_captions():
    owners = [image for image in range(12) for _ in range(1 + image % 7)]
    similarity = torch.from_numpy(RNG.random((12, len(owners))))
    got = evaluate.recall_at_k(similarity, owners, ks=(1, 3, 40))
    for k in (1, 3, 40):
        i2t = np.mean([any(owners[t] == i for t in np.argsort(-similarity[i].numpy())[:k]) for i in range(12)])
        t2i = np.mean([owners[t] in np.argsort(-similarity[:, t].numpy())[:k] for t in range(len(owners))])
        assert got["i2t"][k] == pytest.approx(i2t) and got["t2i"][k] == pytest.approx(t2i)
    assert got["i2t"][40] == 1.0


@pytest.mark.parametrize("block", [1, 200, 10 ** 6])
def test_recall_of_features_is_that_of_their_similarities(block):
    """Captions in any order, one picture without any, whatever is held at a time."""
    owners = RNG.permutation([image for image in range(12) for _ in range(1 + image % 7)])
    images, texts = (F.normalize(torch.from_numpy(RNG.normal(size=(n, 3))), dim=1) for n in (13, len(owners)))
    got = evaluate.recall_of_features(images, texts, owners, block=block)
    assert got == evaluate.recall_at_k(images @ texts.T, owners)
    for k in (1, 5, 10):
        i2t = np.mean([any(owners[t] == i for t in np.argsort(-(images[i] @ texts.T).numpy())[:k]) for i in range(13)])
        assert got["i2t"][k] == pytest.approx(i2t)


def test_a_model_that_tells_nothing_apart_recalls_nothing():
    same = torch.ones(20, 4)
    assert evaluate.recall_of_features(same, same, torch.arange(20))["i2t"] == {1: 0.0, 5: 0.0, 10: 0.0}
    assert evaluate.recall_at_k(torch.zeros(20, 40), torch.arange(40) // 2)["t2i"] == {1: 0.0, 5: 0.0, 10: 0.0}


def test_features_that_are_not_finite_are_no_score(tmp_path):
    for name in Oracle.axes:
        paint(tmp_path / name / "0.png", name)
    model = Oracle()
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="features are not finite for . of 3 inputs"):
        evaluate.zeroshot(model, model.tokenizer, tmp_path)


def test_mean_iou_equals_a_loop_over_pixels():
    label, guess = RNG.integers(0, 4, 500), RNG.integers(0, 3, 500)
    confusion = torch.zeros(5, 5, dtype=torch.long)  # class 4 never occurs and does not count
    for a, b in zip(label, guess):
        confusion[a, b] += 1
    expected = np.mean([((label == c) & (guess == c)).sum() / ((label == c) | (guess == c)).sum() for c in range(4)])
    assert evaluate.mean_iou(confusion) == pytest.approx(expected)


# ---------------------------------------------------------------- a model that knows the answers

class Oracle(torch.nn.Module):
    """Tells pictures of one colour, and words, by their colour: red, green, blue are the axes of the joint space."""
    config = SimpleNamespace(image_size=32, grid=4, embed_dim=3, context_length=8, width=3, interpolation="bicubic")
    axes = dict(red=0, green=1, blue=2)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(3))

    def encode_image(self, images):
        return images.mean((2, 3)).clamp(min=0) @ self.weight

    def encode_patches(self, images):
        return F.avg_pool2d(images, 8).flatten(2).transpose(1, 2).clamp(min=0)

    def encode_text(self, tokens):
        return F.one_hot(tokens[:, 1], 3).float() * 7

    def visual(self, images):
        return images.mean((2, 3))[:, None]

    def tokenizer(self, text, context_length):
        word = next(word for word in text.split() if word in self.axes)
        return torch.tensor([[8, self.axes[word], *[7] * text.count("a"), 9]])


def paint(path, colour, half=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (32, 32), colour)
    if half:
        image.paste(half, (16, 0, 32, 32))
    image.save(path)


def test_zeroshot_and_linear_on_a_class_folder(tmp_path):
    for split in ("train", "test"):
        for name in Oracle.axes:
            for i in range(5):
                paint(tmp_path / split / name / f"{i}.png", name)
    paint(tmp_path / "test/red/9.png", "blue")  # one of sixteen is wrong
    model = Oracle()
    result = evaluate.zeroshot(model, model.tokenizer, tmp_path / "test")
    assert result["scores"]["top-1"] == pytest.approx(15 / 16)
    assert result["scores"]["mean per class"] == pytest.approx((1 + 1 + 5 / 6) / 3)
    assert result["per_class"] == pytest.approx(dict(red=5 / 6, green=1.0, blue=1.0))
    assert evaluate.linear(model, evaluate.probe_sets(tmp_path))["scores"]["top-1"] == pytest.approx(15 / 16)
    (tmp_path / "test/red/9.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot read the picture .*9.png"):
        evaluate.zeroshot(model, model.tokenizer, tmp_path / "test")


def test_retrieval_on_a_karpathy_json(tmp_path):
    images = []
    for i, name in enumerate(Oracle.axes):
        paint(tmp_path / f"images/{i}.png", name)
        images.append(dict(filename=f"{i}.png", split="test", sentences=[dict(raw=f"a {name}"), dict(raw=name)]))
    images.append(dict(filename="other.png", split="train", sentences=[dict(raw="a red")]))
    (tmp_path / "karpathy.json").write_text(json.dumps(dict(images=images)))
    model = Oracle()
    scores = evaluate.retrieval(model, model.tokenizer, tmp_path)["scores"]
    assert scores["i2t R@1"] == 1.0 and scores["t2i R@1"] == 1.0


def test_dense_on_two_halves(tmp_path):
    paint(tmp_path / "images/0.png", "red", "blue")
    label = Image.new("L", (32, 32), 1)
    label.paste(3, (16, 0, 32, 32))
    label.paste(0, (12, 0, 20, 32))  # the border is left out
    (tmp_path / "labels").mkdir()
    label.save(tmp_path / "labels/0.png")
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    model = Oracle()
    assert evaluate.dense(model, model.tokenizer, tmp_path)["scores"] == {"mIoU": 1.0, "pixel accuracy": 1.0}


def test_classifier_is_the_mean_over_templates():
    model = Oracle()
    rows = evaluate.zeroshot_classifier(model, model.tokenizer, ["green", "red"], ["{}", "a {}", "a picture of a {}"])
    assert torch.allclose(rows, torch.tensor([[0.0, 1, 0], [1, 0, 0]]))


def test_synonyms_are_averaged_as_slip_does_and_the_first_is_taken_as_elevater_does(tmp_path):
    model, said = Oracle(), []

    def tokenizer(text, context_length):
        said.append(text)
        return model.tokenizer(text, context_length)
    rows = evaluate.zeroshot_classifier(model, tokenizer, [["green", "blue"], "red"], ["{}", "a {}"])
    assert torch.allclose(rows, torch.tensor([[0.0, 0.5 ** 0.5, 0.5 ** 0.5], [1, 0, 0]]))
    paint(tmp_path / "0.png", "green")
    tests = data.TestSet("x", tmp_path, [tmp_path / "0.png"], torch.tensor([0]), [["green", "blue"], ["red"]], ["{}"])
    for synonyms, expected in ((False, ["green", "red"]), (True, ["green", "blue", "red"])):
        said.clear()
        evaluate.zeroshot(model, tokenizer, tests, synonyms=synonyms)
        assert said == expected


def test_the_cache_knows_weights_prompts_and_pictures(tmp_path):
    made = []

    def make(x):
        made.append(x)
        return torch.tensor([x])
    (tmp_path / "last.pt").write_bytes(b"weights")
    cache = evaluate.Cache(tmp_path / "last.pt")
    assert cache("classifier", ("a", "b"), lambda: make(1.0)) == cache("classifier", ("a", "b"), lambda: make(2.0)) == 1
    assert cache("classifier", ("a", "c"), lambda: make(3.0)) == 3
    assert cache("features", ("a", "b"), lambda: make(4.0)) == 4
    assert evaluate.Cache(tmp_path / "last.pt")("classifier", ("a", "b"), lambda: make(5.0)) == 1 and made == [1, 3, 4]
    assert len(list(tmp_path.glob("last.pt.*"))) == 3
    (tmp_path / "last.pt").write_bytes(b"other weights")
    assert evaluate.Cache(tmp_path / "last.pt")("classifier", ("a", "b"), lambda: make(6.0)) == 6
    assert len(list(tmp_path.glob("last.pt.*"))) == 2  # what belonged to the old weights is gone, of this kind
    assert evaluate.NO_CACHE("classifier", ("a", "b"), lambda: make(7.0)) == 7

    paths = [tmp_path / "a.png", (tmp_path / "z.zip", "b.png"), np.zeros((2, 2), np.uint8)]
    for path in (tmp_path / "a.png", tmp_path / "z.zip"):
        path.write_bytes(b"1")
    stamps = [evaluate._stamp(paths), evaluate._stamp(paths[::-1]), evaluate._stamp([*paths[:2], paths[2] + 1])]
    for path in (tmp_path / "a.png", tmp_path / "z.zip"):
        path.write_bytes(b"22")
        stamps.append(evaluate._stamp(paths))
    assert len(set(stamps)) == 5


def test_the_cache_knows_settings_beside_weights_and_survives_damage(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    caches = [evaluate.Cache(tmp_path)]
    for content in ('{"hidden_act": "gelu"}', '{"hidden_act": "quick_gelu"}'):
        (tmp_path / "config.json").write_text(content)
        caches.append(evaluate.Cache(tmp_path))
    for n, cache in enumerate(caches):
        assert cache("classifier", 1, lambda n=n: torch.tensor([n])) == n
    kept = list(tmp_path.glob("model.safetensors.classifier-*.pt"))
    assert len(kept) == 1
    for content in (b"", kept[0].read_bytes()[:-100]):
        kept[0].write_bytes(content)
        assert caches[-1]("classifier", 1, lambda: torch.tensor([9])) == 9


def test_the_user_s_cache_is_cleared_of_old_weights_too(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    (tmp_path / "last.pt").write_bytes(b"1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/last.pt").write_bytes(b"1")
    evaluate.Cache(tmp_path / "other/last.pt")("features", 1, lambda: torch.ones(1))
    for content in (b"2", b"3"):
        (tmp_path / "last.pt").write_bytes(content)
        evaluate.Cache(tmp_path / "last.pt")("features", 1, lambda: torch.ones(1))
    assert len(list((tmp_path / "home/maskclip").iterdir())) == 2  # this file's newest, and the other's


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "last.pt").write_bytes(b"weights")

    def full(value, file):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    assert evaluate.Cache(tmp_path / "last.pt")("features", 1, lambda: torch.ones(1)) == 1
    assert "warning: features not kept for the next time" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    monkeypatch.setattr(data, "to_make", lambda *_: full(0, 0))
    assert evaluate.Cache(tmp_path / "last.pt")("features", 1, lambda: torch.ones(1)) == 1
    assert "warning: features not kept for the next time" in capsys.readouterr().err


def test_two_evaluations_at_once_keep_each_other_s_records(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"weights")
    records = evaluate.Records(evaluate.Cache(tmp_path / "last.pt"), SimpleNamespace(
        config=evaluate.models.ModelConfig(), remarks=[]))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: records.add(f"task {n}", dict(scores={"x": n})), range(40)))
    assert sorted(r["scores"]["x"] for r in evaluate.read_records(records.path)) == list(range(40))


def test_results_json_that_is_not_ours_is_left_alone(tmp_path):
    model = SimpleNamespace(config=evaluate.models.ModelConfig(), remarks=[])
    (tmp_path / "last.pt").write_bytes(b"weights")
    for content in ('{"accuracy": 3}', "[1]", "{", '[{"scores": 1}]'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match="results.json was not written by evaluate.py: move it away"):
            evaluate.Records(evaluate.Cache(tmp_path / "last.pt"), model)
        assert (tmp_path / "results.json").read_text() == content


@pytest.mark.peers
def test_logistic_regression_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 10))
    y = (x @ rng.normal(size=(10, 4)) + rng.normal(size=(300, 4))).argmax(1)
    x = x * [0.1, 1, 1, 1, 1, 1, 1, 1, 1, 5] + 3
    reference = linear_model.LogisticRegression(C=1 / 3, tol=1e-8, max_iter=5000).fit(x, y)
    predict = evaluate.logistic_regression(torch.tensor(x).float(), torch.tensor(y), 4, 3.0)
    ours = predict(torch.tensor(x).float()).softmax(1).numpy()
    assert np.abs(ours - reference.predict_proba(x)).max() < 1e-3

    several = (x @ rng.normal(size=(10, 3)) + rng.normal(size=(300, 3)) > 1).astype(int)  # one regression per class
    predict = evaluate.logistic_regression(torch.tensor(x).float(), torch.tensor(several), 3, 3.0)
    ours = predict(torch.tensor(x).float()).sigmoid().numpy()
    for c in range(3):
        reference = linear_model.LogisticRegression(C=1 / 3, tol=1e-8, max_iter=5000).fit(x, several[:, c])
        assert np.abs(ours[:, c] - reference.predict_proba(x)[:, 1]).max() < 1e-3


# ---------------------------------------------------------------- loading, the word map

class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps(dict(model_config=Evil()))])
def test_what_is_no_checkpoint_is_refused_without_running_it(tmp_path, content, capsys):
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(ValueError, match="last.pt is not a checkpoint"):
        evaluate.load_model(tmp_path / "last.pt")
    torch.save(dict(weights=torch.ones(1)), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no weights that are known here .*its first keys are weights"):
        evaluate.load_model(tmp_path / "other.pt")
    assert capsys.readouterr().out == ""


def test_newest_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint under"):
        evaluate.newest_checkpoint(tmp_path)


def test_heatmap_lights_up_the_word_s_place(tmp_path):
    image = Image.new("RGB", (64, 64), "red")
    image.paste("blue", (32, 0, 64, 64))
    model = Oracle()
    evaluate.heatmap(model, model.tokenizer, image, "a red and a blue", tmp_path / "map.png", side=100)
    sheet = np.array(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
    assert sheet.shape[1] == max(3 * 108 + 8, 470)  # the picture and two words; articles have no map
    red, blue = sheet[80:150, 116:216], sheet[80:150, 224:324]
    bright = [panel[:, 10:40].sum() - panel[:, 60:90].sum() for panel in (red, blue)]
    assert bright[0] > 0 > bright[1]  # yellow is brighter than violet
    evaluate.heatmap(model, model.tokenizer, image, "a red", tmp_path / "one.png", side=100)  # one word has a map too
    one = np.array(Image.open(tmp_path / "one.png").convert("RGB")).astype(int)[80:150, 116:216]
    assert one[:, 10:40].sum() > one[:, 60:90].sum()
    with pytest.raises(ValueError, match="no word to look for"):
        evaluate.heatmap(model, model.tokenizer, image, "of the", tmp_path / "map.png")


def test_find_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match="no test set 'flickr30k': looked for the folders .*flickr30k/val"):
        evaluate.find("flickr30k", tmp_path, "val")
    (tmp_path / "mine").mkdir()
    assert evaluate.find(str(tmp_path / "mine"), "nowhere", "val") == tmp_path / "mine"


def encode_items(calls, items):
    calls.append(items)
    if "bad" in items:
        raise ValueError("cannot read bad")
    return torch.tensor([[item, -item] for item in items])


def encode_on(rank, port, queue):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    for count in (7, 2):
        calls = []
        rows = evaluate.shared_out(partial(encode_items, calls), list(range(count)))
        queue.put((count, rank, sum(calls, []), rows.tolist()))
    try:
        evaluate.shared_out(partial(encode_items, []), [1, "bad", 3])
    except ValueError as error:
        queue.put(("bad", rank, [], str(error)))
    torch.distributed.destroy_process_group()


def test_ranks_share_a_set_without_padding():
    """7 and 2 items on three ranks: each encoded once, all rows in order everywhere."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    context = torch.multiprocessing.spawn(encode_on, (port, queue), nprocs=3, join=False)
    got = [queue.get() for _ in range(9)]
    context.join()
    for count in (7, 2):
        assert sorted(item for n, _, mine, _ in got for item in mine if n == count) == list(range(count))
        assert all(rows == [[item, -item] for item in range(count)] for n, _, _, rows in got if n == count)
    assert [said for n, _, _, said in got if n == "bad"] == ["cannot read bad"] * 3  # nobody waits for who could not


# ---------------------------------------------------------------- other projects' weights

PIXELS = torch.randint(256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TEXTS = ["a dog", "two teddy bears in the snow, seen from afar"]


def equal_features(path, image, text, tokens, atol=1e-4):
    """load_model(path) gives these features of PIXELS and TEXTS.  -> model, tokenizer"""
    model, tokenizer = evaluate.load_model(path)
    with torch.no_grad():
        ours = model.encode_image(data.normalize(PIXELS))
        assert image.std() > 0.01 and torch.allclose(ours, image, atol=atol), (ours - image).abs().max()
        assert torch.equal(tokenizer(TEXTS, 77), tokens[:, :tokenizer(TEXTS, 77).size(1)])
        assert torch.allclose(model.encode_text(tokenizer(TEXTS, 77)), text, atol=atol)
    return model, tokenizer


def shaken(module, seed=0):
    """Random weights everywhere, those that start as 0 or 1 too: a bias that is lost would not be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    return module.eval()


@pytest.mark.peers
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-B-32-quickgelu"])
def test_open_clip_s_weights(name, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = shaken(open_clip.create_model(name))
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    with torch.no_grad():
        image = theirs.encode_image(data.normalize(PIXELS, evaluate.CLIP_MEAN, evaluate.CLIP_STD))
        text = theirs.encode_text(tokens)
    state, quick = theirs.state_dict(), "quickgelu" in name
    if quick:  # the folder says what the file does not
        safetensors.save_file(state, tmp_path / "open_clip_model.safetensors")
        (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(
            model_cfg=open_clip.get_model_config(name), preprocess_cfg=dict(
                mean=evaluate.CLIP_MEAN, std=evaluate.CLIP_STD, interpolation="bilinear", resize_mode="squash"))))
        path = tmp_path
    else:
        path = tmp_path / "weights.pt"
        torch.save(dict(state_dict={f"module.{key}": x for key, x in state.items()}, epoch=3), path)
    model, tokenizer = equal_features(path, image, text, tokens)
    assert model.config.method == "clip" and model.config.interpolation == ("bilinear" if quick else "bicubic")
    assert len(model.remarks) == 1 and ("resized by 'squash'" if quick else "GELU or QuickGELU") in model.remarks[0]

    classes, templates = ["dog", "pink primrose", "F-16A/B"], ["a photo of a {}.", "art of the {}."]
    classifier = evaluate.zeroshot_classifier(model, tokenizer, classes, templates)
    reference = open_clip.build_zero_shot_classifier(
        theirs, open_clip.get_tokenizer(name), classes, [lambda c, t=t: t.replace("{}", c) for t in templates], 2)
    assert torch.allclose(classifier, reference.T, atol=1e-5)
    logits = 100 * F.normalize(model.encode_image(data.normalize(PIXELS)), dim=1) @ classifier.T
    assert torch.allclose(logits, 100 * F.normalize(image, dim=1) @ reference, atol=1e-3)


@pytest.mark.peers
def test_openai_s_download_is_read_without_running_its_program(tmp_path):
    """A TorchScript archive of OpenAI's model in half precision, and its state dict."""
    open_clip = pytest.importorskip("open_clip")
    theirs = shaken(open_clip.create_model("ViT-B-32-quickgelu"))
    tokens = open_clip.get_tokenizer("ViT-B-32-quickgelu")(TEXTS)
    for p in theirs.parameters():
        p.data = p.data.half().float()
    with torch.no_grad():
        image = theirs.encode_image(data.normalize(PIXELS, evaluate.CLIP_MEAN, evaluate.CLIP_STD))
        text = theirs.encode_text(tokens)
    for name, x in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
        theirs.register_buffer(name, torch.tensor(x)) if not hasattr(theirs, name) else None
    traced = torch.jit.trace(theirs.half(), (PIXELS.movedim(-1, 1).half(), tokens), check_trace=False)
    traced.save(tmp_path / "ViT-B-32.pt")
    equal_features(tmp_path / "ViT-B-32.pt", image, text, tokens)
    state = {name: x for name, x in traced.state_dict().items()} | {"input_resolution": torch.tensor(224)}
    torch.save(state, tmp_path / "state.pt")
    model, _ = equal_features(tmp_path / "state.pt", image, text, tokens)
    assert model.config.quick_gelu == (True, True) and not model.remarks


@pytest.mark.peers
@pytest.mark.parametrize("act,form", [("quick_gelu", "safetensors"), ("gelu", "bin"), ("quick_gelu", "file")])
def test_hugging_face_s_clip(act, form, tmp_path):
    transformers = pytest.importorskip("transformers")
    vision = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=3, patch_size=32,
                  image_size=224, hidden_act=act)
    words = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, hidden_act=act)
    if form == "file":  # alone: heads of 64
        vision |= dict(hidden_size=128, intermediate_size=512, num_attention_heads=2)
    theirs = shaken(transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=words,
                                                                   projection_dim=48)))
    mean, std = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)) if form == "bin" else (evaluate.CLIP_MEAN, evaluate.CLIP_STD)
    path = tmp_path
    if form == "bin":
        theirs.config.save_pretrained(tmp_path)
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(image_mean=mean, image_std=std, resample=2)))
    else:
        theirs.save_pretrained(tmp_path)
    if form == "file":
        (tmp_path / "model.safetensors").rename(tmp_path / "clip.safetensors")
        path = tmp_path / "clip.safetensors"
    tokens = Tokenizer.clip()(TEXTS)
    with torch.no_grad():
        image = theirs.visual_projection(theirs.vision_model(data.normalize(PIXELS, mean, std)).pooler_output)
        out = theirs.text_model(tokens).last_hidden_state
        text = theirs.text_projection(out[torch.arange(2), (tokens == 49407).int().argmax(1)])
    model, _ = equal_features(path, image, text, tokens)
    assert len(model.remarks) == (form == "file")
    assert model.config.interpolation == ("bilinear" if form == "bin" else "bicubic")  # 2 is Pillow's bilinear


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["clip", "slip", "simclr"])
def test_slip_s_released_files(kind, tmp_path):
    """Keys and contents as SLIP's main.py saves them, an argparse.Namespace among these."""
    open_clip, timm = pytest.importorskip("open_clip"), pytest.importorskip("timm")
    visual = shaken(timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0))
    words = shaken(open_clip.create_model("ViT-B-32-quickgelu"))
    projection = torch.randn(384, 512, generator=torch.Generator().manual_seed(1)) * 384 ** -0.5
    state = {f"module.visual.{name}": x for name, x in visual.state_dict().items()}
    if kind != "simclr":
        state |= {f"module.{name}": x for name, x in words.state_dict().items() if not name.startswith("visual.")}
        state["module.image_projection"] = projection
    if kind != "clip":
        state |= {"module.image_mlp.layer1.weight": torch.zeros(4, 384), "module.image_mlp.bn1.bias": torch.zeros(4)}
    torch.save(dict(epoch=25, state_dict=state, best_acc1=42.8, args=argparse.Namespace(model="SLIP_VITS16", lr=3e-3)),
               tmp_path / "slip.pt")
    tokens = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    with torch.no_grad():
        features = visual(data.normalize(PIXELS))
        if kind == "simclr":
            model, tokenizer = evaluate.load_model(tmp_path / "slip.pt")
            assert tokenizer is None
            assert torch.allclose(model.visual(data.normalize(PIXELS))[:, 0], features, atol=1e-4)
        else:
            model, _ = equal_features(tmp_path / "slip.pt", features @ projection, words.encode_text(tokens), tokens)
    assert (model.config.method, model.config.interpolation, model.config.heads) == (kind, "bilinear", 12)


@pytest.mark.peers
@pytest.mark.parametrize("form", ["mae", "timm"])
def test_vits_of_timm_and_mae(form, tmp_path):
    timm = pytest.importorskip("timm")
    theirs = shaken(timm.create_model("vit_base_patch16_224"))
    if form == "mae":
        mean, std, path = data.IMAGENET_MEAN, data.IMAGENET_STD, tmp_path / "mae.pth"
        decoder = {"mask_token": torch.zeros(1), "decoder_embed.weight": torch.zeros(1)}
        torch.save(dict(model=theirs.state_dict() | decoder, args=argparse.Namespace(lr=1)), path)
    else:
        mean, std, path = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), tmp_path
        pytest.importorskip("safetensors.torch").save_file(theirs.state_dict(), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(dict(pretrained_cfg=dict(
            mean=mean, std=std, interpolation="bilinear"))))
    model, tokenizer = evaluate.load_model(path)
    assert model.config.interpolation == ("bicubic" if form == "mae" else "bilinear")
    assert tokenizer is None and model.config.method == ("mae" if form == "mae" else "vit")
    with torch.no_grad():
        assert torch.allclose(model.visual(data.normalize(PIXELS)), theirs.forward_features(
            data.normalize(PIXELS, mean, std)), atol=1e-4)


def safetensors_file(header, body=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + body


def test_safetensors(tmp_path):
    x, y = torch.arange(6.0).reshape(2, 3).to(torch.bfloat16), torch.tensor([[7]], dtype=torch.int64)
    body = b"!" + y.numpy().tobytes() + x.view(torch.int16).numpy().tobytes()
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors_file({"x": dict(dtype="BF16", shape=[2, 3], data_offsets=[9, 21]), "__metadata__": {},
                                       "y": dict(dtype="I64", shape=[1, 1], data_offsets=[1, 9])}, body))
    read = evaluate.read_safetensors(file)
    assert read.keys() == {"x", "y"} and torch.equal(read["x"], x) and torch.equal(read["y"], y)
    good = dict(dtype="F32", shape=[1], data_offsets=[0, 4])
    wrongs = [{"x": good | dict(dtype="F1")}, {"x": good | dict(shape=[2])}, {"x": dict(dtype="F32")}, b"[1]", b"{"]
    for wrong in (b"", b"\xff" * 12, safetensors_file({"x": good}, b"123"),
                  *(safetensors_file(header, b"1234") for header in wrongs)):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match="x.safetensors is not a checkpoint"):
            evaluate.load_model(file)


def archive(path, pickled):
    """A TorchScript archive whose data.pkl is `pickled`."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/constants.pkl", b"")
        file.writestr("x/data/0", torch.ones(4).numpy().tobytes())
    return path


class Program(torch.nn.Module):
    """What a TorchScript archive may hold beside tensors: modules in modules, typed lists and dicts."""
    sizes: list[int]
    names: dict[str, int]

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(2, 3).half(), torch.nn.LayerNorm(3).bfloat16())
        self.register_buffer("count", torch.tensor(3))
        self.sizes, self.names = [1, 2], {"a": 1}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + len(self.sizes) + self.names["a"]


def test_the_tensors_of_a_program_are_read(tmp_path):
    program = Program()
    torch.jit.save(torch.jit.script(program), tmp_path / "program.pt")
    read = evaluate._load(tmp_path / "program.pt")
    assert read.pop("torchscript") and read.keys() == program.state_dict().keys()
    assert all(torch.equal(read[name], x) and read[name].dtype == x.dtype for name, x in program.state_dict().items())


def test_a_program_is_not_run(tmp_path):
    call = b"system\n(S'echo this ran > ran'\ntR."
    for pickled in (pickle.dumps(Evil()), b"c__torch__.os\n" + call, b"cos\n" + call):
        with pytest.raises(ValueError, match="is not a checkpoint, or is damaged|would run code, which is not"):
            evaluate.load_model(archive(tmp_path / "program.pt", pickled))
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "program.pt")
    with pytest.raises(ValueError, match="holds no weights that are known here .*its first keys are weight, bias"):
        evaluate.load_model(tmp_path / "program.pt")


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save(dict(state_dict=dict(x=torch.ones(1)), args=Evil()), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt would run code, which is not done here .*GLOBAL .*print"):
        evaluate.load_model(tmp_path / "evil.pt")
    assert "this must not run" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="a folder without model.safetensors"):
        evaluate.load_model(tmp_path)


def test_weights_of_other_shapes_are_told(tmp_path):
    """A vocabulary that is not CLIP's, positions that are no square, a tower with parts that ours has not."""
    state = {"visual.conv1.weight": torch.zeros(64, 3, 8, 8), "visual.class_embedding": torch.zeros(64),
             "visual.positional_embedding": torch.zeros(17, 64), "visual.proj": torch.zeros(64, 32),
             "token_embedding.weight": torch.zeros(100, 64), "positional_embedding": torch.zeros(77, 64),
             "ln_final.weight": torch.zeros(64), "text_projection": torch.zeros(64, 32), "logit_scale": torch.ones(())}
    for change, why in ((state, "vocabulary has 100 tokens"),
                        (state | {"visual.positional_embedding": torch.zeros(16, 64)}, "16 positions are no square"),
                        (state | {"token_embedding.weight": torch.zeros(49408, 64)}, "fit model.py: .*Missing key")):
        torch.save(change, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match=f"odd.pt .*{why}"):
            evaluate.load_model(tmp_path / "odd.pt")


BLOCK = {"blocks.0.attn.qkv.weight": torch.zeros(1), "patch_embed.proj.weight": torch.zeros(1),
         "cls_token": torch.zeros(1), "norm.weight": torch.zeros(1)}


@pytest.mark.parametrize("state", [
    BLOCK, BLOCK | {"pos_embed": torch.zeros(1, 5, 1)}, {"model": BLOCK},
    {"vision_model.embeddings.class_embedding": torch.zeros(1),
     "text_model.embeddings.token_embedding.weight": torch.zeros(1)},
    {"visual.patch_embed.proj.weight": torch.zeros(1), "image_mlp.layer1.weight": torch.zeros(1)},
    dict(model_config=dict(width="wide"), model={}, tokenizer=[]), dict(model_config=[1], model={}, tokenizer=[]),
    dict(model_config={}, model=3, tokenizer=[]), dict(model_config=dict(unknown=1), model={}, tokenizer=[])])
def test_half_a_state_is_told(state, tmp_path):
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="odd.pt (is of a kind that is known, and )?does not fit"):
        evaluate.load_model(tmp_path / "odd.pt")


@pytest.mark.parametrize("content", ["{", "[1]", '{"pretrained_cfg": null}', '{"pretrained_cfg": {"mean": "x"}}', "3"])
def test_odd_settings_beside_weights_are_told(content, tmp_path):
    torch.save(BLOCK | {"pos_embed": torch.zeros(1, 5, 1), "patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)},
               tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        evaluate.load_model(tmp_path)
