"""Metrics against naive loops and scikit-learn, evaluations on sets whose answer is known, loading, the word map."""
import json
import pickle
import socket
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate

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
    config = SimpleNamespace(image_size=32, grid=4, embed_dim=3, context_length=8)
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
    assert evaluate.linear(model, tmp_path)["scores"]["top-1"] == pytest.approx(15 / 16)
    (tmp_path / "test/red/9.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot read the test picture .*9.png"):
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


@pytest.mark.peers
def test_logistic_regression_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 10))
    y = (x @ rng.normal(size=(10, 4)) + rng.normal(size=(300, 4))).argmax(1)
    scaled = (x - x.mean(0)) / x.std(0, ddof=1)
    reference = linear_model.LogisticRegression(C=1 / (300 * 0.01), tol=1e-8, max_iter=5000).fit(scaled, y)
    predict = evaluate.logistic_regression(torch.tensor(x).float(), torch.tensor(y), 4, 0.01)
    ours = predict(torch.tensor(x).float()).softmax(1).numpy()
    assert np.abs(ours - reference.predict_proba(scaled)).max() < 1e-3


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
    with pytest.raises(ValueError, match="no 'model_config'"):
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
