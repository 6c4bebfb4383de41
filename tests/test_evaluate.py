"""Metrics against naive loops, evaluations of a model whose answers are known, the command line."""
import dataclasses
import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, answer
from PIL import Image

import data
import evaluate
import model as models
from support import probe, testsets
from tokenizer import Tokenizer

RNG = np.random.default_rng(0)


# ---------------------------------------------------------------- metrics

@pytest.mark.parametrize("block", [1, 200, 10 ** 6])
def test_recall_equals_a_loop(block):
    """One to seven captions in any order, one picture without any, any number held at a time."""
    owners = RNG.permutation([image for image in range(12) for _ in range(1 + image % 7)])
    images, texts = (F.normalize(torch.from_numpy(RNG.normal(size=(n, 3))), dim=1)
                     for n in (13, len(owners)))
    got = evaluate.recall_of_features(images, texts, owners, ks=(1, 3, 40), block=block)
    assert got == evaluate.recall_at_k(images @ texts.T, owners, ks=(1, 3, 40))
    order = np.argsort(-(images @ texts.T).numpy())
    order_t = np.argsort(-(texts @ images.T).numpy())
    nothing = evaluate.recall_at_k(torch.zeros(13, len(owners)), owners, ks=(1, 3))
    assert nothing == dict.fromkeys(("i2t", "t2i"), {1: 0.0, 3: 0.0})  # tells nothing apart
    for k in (1, 3, 40):
        i2t = np.mean([i in owners[order[i, :k]] for i in range(13)])
        t2i = np.mean([owners[t] in order_t[t, :k] for t in range(len(owners))])
        assert got["i2t"][k] == pytest.approx(i2t) and got["t2i"][k] == pytest.approx(t2i)


def test_mean_iou_equals_a_loop_over_pixels():
    label, guess = RNG.integers(0, 5, 500), RNG.integers(0, 3, 500)  # label 4: left out
    confusion = evaluate.confusion_matrix(torch.from_numpy(guess), torch.from_numpy(label), 4)
    label, guess = label[label < 4], guess[label < 4]
    iou = np.mean([((label == c) & (guess == c)).sum() / ((label == c) | (guess == c)).sum()
                   for c in range(4)])
    assert evaluate.segmentation_scores(confusion) == pytest.approx(
        {"mIoU": iou, "pixel accuracy": (label == guess).mean()})
    assert evaluate.mean_iou(F.pad(confusion, (0, 1, 0, 1))) == pytest.approx(iou)  # never seen


# ---------------------------------------------------------------- a model that knows the answers

class Oracle(torch.nn.Linear):
    """Red, green and blue, of pictures and words, are the axes of the joint space."""
    config = SimpleNamespace(image_size=32, grid=4, embed_dim=3, context_length=8,
                             interpolation="bicubic")
    axes = dict(red=0, green=1, blue=2)
    said = []

    def encode_image(self, images):
        return images.mean((2, 3)).clamp(min=0)

    def encode_patches(self, images):
        return F.avg_pool2d(images, 8).flatten(2).transpose(1, 2).clamp(min=0)

    def encode_text(self, tokens):
        return F.one_hot(tokens[:, 1], 3).float() * 7

    def visual(self, images):
        return images.mean((2, 3))[:, None]

    def tokenizer(self, text, context_length):
        self.said.append(text)
        word = [word for word in text.split() if word in self.axes][0]
        return torch.tensor([[8, self.axes[word], *[7] * text.count("a"), 9]])


MODEL = Oracle(1, 1)


@pytest.fixture
def few_iterations(monkeypatch):
    """L-BFGS ends early: its minimum is compared with scikit-learn's elsewhere."""
    lbfgs = torch.optim.LBFGS
    monkeypatch.setattr(torch.optim, "LBFGS",
                        lambda *given, **settings: lbfgs(*given, **settings | dict(max_iter=5)))


def paint(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), colour).save(path)


def test_zeroshot_and_linear_on_class_folders(few_iterations, tmp_path):
    for split in ("train", "test"):
        for name in Oracle.axes:
            for i in range(5):
                paint(tmp_path / split / name / f"{i}.png", name)
    paint(tmp_path / "test/red/9.png", "blue")  # one of sixteen is wrong
    result = evaluate.zeroshot(MODEL, MODEL.tokenizer, tmp_path / "test")
    assert result["scores"] == {"top-1": pytest.approx(15 / 16),
                                "mean per class": pytest.approx((1 + 1 + 5 / 6) / 3)}
    assert result["per_class"] == pytest.approx(dict(red=5 / 6, green=1.0, blue=1.0))
    assert result["chance"] == 1 / 3
    scores = evaluate.linear(MODEL, testsets.probe_sets(tmp_path))["scores"]
    assert scores["top-1"] == pytest.approx(15 / 16)
    (tmp_path / "test/red/9.png").write_text("no picture")
    with pytest.raises(ValueError, match="9.png"):
        evaluate.zeroshot(MODEL, MODEL.tokenizer, tmp_path / "test")
    with pytest.raises(ValueError, match="not finite"):
        evaluate.encode_images(lambda x: x * torch.nan, [tmp_path / "test/red/0.png"], MODEL)


def test_retrieval_takes_one_split_of_a_karpathy_json(tmp_path):
    images = []
    for i, name in enumerate([*Oracle.axes, *Oracle.axes]):
        paint(tmp_path / f"images/{i}.png", name)
        sentences = [dict(raw=f"a {name}"), dict(raw=name if i < 5 else "red")]  # one is wrong
        images.append(dict(filename=f"{i}.png", split="test" if i < 3 else "val",
                           sentences=sentences))
    (tmp_path / "karpathy.json").write_text(json.dumps(dict(images=images)))
    result = evaluate.retrieval(MODEL, MODEL.tokenizer, tmp_path)
    assert result["scores"]["i2t R@1"] == result["scores"]["t2i R@1"] == 1.0
    assert result["chance"] == 1 / 3
    scores = evaluate.retrieval(MODEL, MODEL.tokenizer, tmp_path, "val")["scores"]
    assert scores["t2i R@1"] == pytest.approx(5 / 6)


def test_dense_on_two_halves(tmp_path):
    label = np.repeat(np.uint8([[1, 0, 3]]), [12, 8, 12], 1).repeat(32, 0)  # 0: is left out
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, :16, 0] = picture[:, 16:, 2] = 255
    for name, pixels in (("images", picture), ("labels", label)):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    result = evaluate.dense(MODEL, MODEL.tokenizer, tmp_path)
    assert result["scores"] == {"mIoU": 1.0, "pixel accuracy": 1.0}
    assert "1 of the classes" in result["notes"][0] and "green" in result["notes"][0]


def test_templates_and_synonyms(tmp_path):
    """SLIP takes the mean over all names of a class, ELEVATER its first one."""
    templates = ["{}", "a {}", "a picture of a {}"]
    rows = evaluate.zeroshot_classifier(MODEL, MODEL.tokenizer, [["green", "blue"], "red"],
                                        templates)
    assert torch.allclose(rows, torch.tensor([[0.0, 0.5 ** 0.5, 0.5 ** 0.5], [1, 0, 0]]))
    paint(tmp_path / "0.png", "green")
    tests = testsets.TestSet("x", tmp_path, [tmp_path / "0.png"], torch.tensor([0]),
                             [["green", "blue"], ["red"]], ["{}"])
    MODEL.said.clear()
    evaluate.zeroshot(MODEL, MODEL.tokenizer, tests)
    evaluate.zeroshot(MODEL, MODEL.tokenizer, tests, synonyms=True)
    assert MODEL.said == ["green", "red", "green", "blue", "red"]


# ---------------------------------------------------------------- a small model

@pytest.fixture(scope="module")
def tiny():
    """A model with random weights, and a tokenizer of few words."""
    tokenizer = Tokenizer.train(["a photo of a dog", "a picture of the number"] * 20, 560)
    torch.manual_seed(0)
    config = replace(SMALL, method="clip", vocab_size=len(tokenizer), context_length=16)
    return models.build(config).eval(), tokenizer


def save(model, tokenizer, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(model=model.state_dict(), model_config=dataclasses.asdict(model.config),
                    tokenizer=[" ".join(pair) for pair in tokenizer.merges]), path)


def class_folders(folder, names, numbers=range(2)):
    """Pictures of noise around a colour of each class."""
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        colour = np.random.default_rng(k).integers(0, 180, 3)
        for i in numbers:
            noise = np.random.default_rng([k, i]).integers(0, 76, (32, 40, 3))
            Image.fromarray((noise + colour).astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """A folder with the set "mine": 4 classes, 30 pictures of each to train on, 10 to test on."""
    home = tmp_path_factory.mktemp("coloured")
    class_folders(home / "mine/train", "abcd", range(30))
    class_folders(home / "mine/test", "abcd", range(30, 40))
    return home


def test_a_saved_model_is_loaded_as_it_was(tiny, tmp_path):
    model, tokenizer = tiny
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        evaluate.newest_checkpoint(tmp_path)
    for name in ("old", "new"):
        save(*tiny, tmp_path / name / "last.pt")
    path = evaluate.newest_checkpoint(tmp_path)
    assert path == tmp_path / "new/last.pt"
    loaded, words = evaluate.load_model(path)
    assert not loaded.training and loaded.notes == [] and words.merges == tokenizer.merges
    texts = ["a dog", "a longer text of the number", ""]
    rows = evaluate.encode_texts(loaded, words, texts)
    alone = [F.normalize(model.encode_text(tokenizer([text])), dim=1) for text in texts]
    assert torch.allclose(rows, torch.cat(alone), atol=1e-5)  # padding and order change nothing
    torch.save(torch.load(path) | dict(model={}), path)
    with pytest.raises(ValueError, match="new/last.pt"):
        evaluate.load_model(path)


def test_pictures_are_seen_as_the_format_wants(tiny, tmp_path):
    """Bicubic or bilinear, cropped or squashed: against Pillow's own calls."""
    image = Image.fromarray(RNG.integers(0, 256, (75, 100, 3), np.uint8))
    image.save(tmp_path / "a.png")
    bicubic = tiny[0].config
    bilinear = replace(bicubic, interpolation="bilinear")
    for view, size, resample in (((bicubic,), (42, 32), Image.BICUBIC),
                                 ((bilinear,), (42, 32), Image.BILINEAR),
                                 ((bicubic, True), (32, 32), Image.BICUBIC)):
        pixels = evaluate.encode_images(lambda x: x, [tmp_path / "a.png"], tiny[0],
                                        evaluate.evaluation_view(*view))
        left = (size[0] - 32) // 2
        expected = image.resize(size, resample).crop((left, 0, left + 32, 32))
        assert torch.equal(pixels[0], data.normalize(torch.from_numpy(np.array(expected))))


def test_scores_over_pictures_rank_the_softmax(tiny, tmp_path):
    """mAP and ROC-AUC compare pictures with each other, which the cosine ranks otherwise."""
    class_folders(tmp_path, "ab", range(30))
    paths = testsets.class_folder(tmp_path)[0]
    targets = F.one_hot(torch.arange(60) % 2)
    tests = testsets.TestSet("x", tmp_path, paths, targets, [["dog"], ["number"]], ["a {}"],
                             "11point_mAP")
    features = F.normalize(evaluate.encode_images(tiny[0].encode_image, paths, tiny[0]), dim=1)
    cosine = features @ evaluate.zeroshot_classifier(*tiny, tests.names, tests.templates).T
    exps = np.exp(100 * cosine.double().numpy())
    right = evaluate.map_11point(exps / exps.sum(1, keepdims=True), targets)
    result = evaluate.zeroshot(*tiny, tests)
    assert result["scores"] == {"11point_mAP": pytest.approx(right, abs=1e-6)}
    assert result["chance"] == 0.5 and abs(right - evaluate.map_11point(cosine, targets)) > 1e-3


def test_the_penalty_is_chosen_as_clip_does(few_iterations, tiny, coloured, monkeypatch):
    fits, fit = [], probe.logistic_regression
    monkeypatch.setattr(probe, "logistic_regression",
                        lambda *given: fits.append(given) or fit(*given))
    result = evaluate.linear(tiny[0], testsets.probe_sets("mine", coloured))
    assert result["scores"]["top-1"] == 1.0
    *search, (x, _, _, last) = fits
    for rows, labels, _, _ in search:
        assert len(rows) == 96 and torch.bincount(labels).tolist() == [24] * 4
    exponents = [round(np.log10(penalty), 3) for *_, penalty in search]
    assert exponents[:7] == [-6, -4, -2, 0, 2, 4, 6] and 11 <= len(exponents) <= 15
    assert len(x) == 120 and result["protocol"]["penalty"] == last


def test_a_probe_of_several_labels_ranks_its_logits(few_iterations, tiny, tmp_path, monkeypatch):
    """One regression per class: their softmax would be another order of the pictures."""
    x = torch.from_numpy(RNG.normal(size=(400, 8))).float()
    y = (x @ torch.from_numpy(RNG.normal(size=(8, 3))).float() > 2).long()
    monkeypatch.setattr(evaluate, "encode_images", lambda encode, pictures, *_: x[pictures])
    sets = [testsets.TestSet("voc", tmp_path, list(part), y[list(part)], [["a"], ["b"], ["c"]], [],
                             "11point_mAP") for part in (range(300), range(300, 400))]
    result = evaluate.linear(tiny[0], sets)
    logits = probe.logistic_regression(x[:300], y[:300], 3, result["protocol"]["penalty"])(x[300:])
    expected = evaluate.map_11point(logits, y[300:])
    assert result["scores"]["11point_mAP"] == pytest.approx(expected)
    assert abs(expected - evaluate.map_11point(logits.softmax(1), y[300:])) > 1e-3
    sets[0] = replace(sets[0], pictures=[0, 1], targets=y[:2])
    with pytest.raises(ValueError, match="too few"):
        evaluate.linear(tiny[0], sets)


@pytest.mark.peers
def test_logistic_regression_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x = RNG.normal(size=(300, 10))
    y = (x @ RNG.normal(size=(10, 4)) + RNG.normal(size=(300, 4))).argmax(1)
    x = x * [0.1, 1, 1, 1, 1, 1, 1, 1, 1, 5] + 3
    several = np.stack([y % 2, y // 2], 1)
    rows = torch.tensor(x).float()
    theirs = linear_model.LogisticRegression(C=1 / 3, tol=1e-8, max_iter=5000)
    ours = probe.logistic_regression(rows, torch.tensor(y), 4, 3.0)(rows).softmax(1).numpy()
    assert np.abs(ours - theirs.fit(x, y).predict_proba(x)).max() < 1e-3
    ours = probe.logistic_regression(rows, torch.tensor(several), 2, 3.0)(rows).sigmoid().numpy()
    for c in range(2):  # one regression per class
        assert np.abs(ours[:, c] - theirs.fit(x, several[:, c]).predict_proba(x)[:, 1]).max() < 1e-3


@pytest.mark.gpu
def test_cuda_scores_as_the_cpu(tiny, coloured):
    model, sets = tiny[0], testsets.probe_sets("mine", coloured)
    texts, images, scores = [], [], []
    for device in ("cpu", "cuda"):
        model.to(device)
        texts.append(evaluate.encode_texts(*tiny, ["a dog", "a number"]))
        images.append(evaluate.encode_images(model.encode_image, sets[1].pictures, model))
        scores.append(evaluate.linear(model, sets)["scores"]["top-1"])
    model.to("cpu")
    assert torch.allclose(*texts, atol=1e-4) and torch.allclose(*images, atol=1e-4)
    assert scores[0] == pytest.approx(scores[1], abs=0.03)  # one picture of 40


# ---------------------------------------------------------------- results

def test_a_table_has_the_papers_numbers_next_to_ours():
    result = dict(scores={"accuracy": 0.5, "other": 0.25}, chance=0.001, over="9 pictures",
                  notes=["a note"])
    columns = {"a.pt": {"zeroshot imagenet": result}, "b.pt": {"linear x": result}}
    lines = evaluate.table(columns, ["maskclip", "vit"]).splitlines()
    assert [line.split() for line in lines] == [
        ["a.pt", "paper", "b.pt"],
        "zeroshot imagenet accuracy 50.0 44.5 - chance 0.1; 9 pictures".split(),
        "other 25.0 -".split(), "linear x accuracy - 50.0 chance 0.1; 9 pictures".split(),
        "other - 25.0".split(), "zeroshot imagenet: a note".split(), "linear x: a note".split(),
        "paper: ViT-B/16, YFCC-15M, 25 epochs".split()]
    assert evaluate.main_scores(columns["a.pt"]) == {"zeroshot imagenet": 0.5}


def test_results_are_lines_of_which_the_last_counts(tiny, tmp_path, capsys):
    result = dict(scores={"x": 0.5}, chance=0.1, over="9", protocol=dict(pictures=9))
    path = tmp_path / "last.pt"
    for weights, score in ((b"1", 0.1), (b"2", 0.2), (b"2", 0.3)):
        path.write_bytes(weights)
        evaluate.append_result(path, tiny[0], "zeroshot a", result | dict(scores={"x": score}))
    evaluate.append_result(path, tiny[0], "zeroshot a", result | dict(protocol=dict(pictures=8)))
    records = evaluate.read_results(tmp_path)
    assert [record["scores"]["x"] for record in records] == [0.1, 0.3, 0.5]
    assert records[1]["sha256"] == hashlib.sha256(b"2").hexdigest()
    assert {"task", "checkpoint", "over", "model", "date", "commit"} <= records[0].keys()
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"task":')
    with pytest.raises(ValueError, match="line 5"):
        evaluate.read_results(tmp_path)
    (tmp_path / "results.jsonl").unlink()
    assert evaluate.read_results(tmp_path) == []
    (tmp_path / "results.jsonl").mkdir()
    evaluate.append_result(path, tiny[0], "zeroshot a", result)
    assert "warning" in capsys.readouterr().err


# ---------------------------------------------------------------- the command line

def run(monkeypatch, capsys, *words):
    """evaluate.py's exit status, lines, errors."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        evaluate.main()
    out, err = capsys.readouterr()
    return end.value.code, out.splitlines(), err


def test_what_fails_does_not_stop_the_rest(tiny, tmp_path, monkeypatch, capsys):
    """A damaged checkpoint, one of ICinW's sets that is damaged, many that are missing."""
    monkeypatch.chdir(tmp_path)
    save(*tiny, tmp_path / "a/last.pt")
    (tmp_path / "bad.pt").touch()
    class_folders(tmp_path / "data/mnist/test", map(str, range(10)))
    classes = testsets.protocols()["eurosat_clip"]["classes"]
    class_folders(tmp_path / "data/eurosat/test", [str(name) for name in classes])
    class_folders(tmp_path / "data/pets/test", ["Abyssinian", "Moon"])
    code, lines, err = run(monkeypatch, capsys, "--zeroshot", "icinw", "--checkpoint", "bad.pt",
                           "a/last.pt", "a/last.pt")
    assert code == 1 and "bad.pt" in err and "Moon" in err and "food-101" not in err
    assert sum("missing: " in line for line in lines) == 18
    results = {record["task"]: record for record in evaluate.read_results(tmp_path / "a")}
    assert list(results) == ["zeroshot eurosat_clip", "zeroshot mnist", "zeroshot icinw"]
    eurosat, mnist, mean = evaluate.main_scores(results).values()
    assert mean == pytest.approx((eurosat + mnist) / 2)
    assert "partial mean" in results["zeroshot icinw"]["scores"]


@pytest.mark.parametrize("words,why", [
    (["--zeroshot", "nowhere"], "nowhere"), (["--zeroshot", "icinw"], "ICinW"),
    (["--linear", "empty"], "empty"), (["--retrieval", "empty"], "karpathy"),
    (["--dense", "empty"], "empty"), (["--zeroshot", "ids"], "WordNet"),
    (["--zeroshot", "empty", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
    (["--zeroshot", "empty", "--checkpoint", "vision.pt"], "text encoder"),
    (["--templates", "7"], "nothing to do"),
    (["--zeroshot", "ids", "--templates", "7"], "no effect"),
    (["--zeroshot", "ids", "--split", "val"], "no effect"),
    (["--linear", "ids", "--names", "x"], "no effect")])
def test_one_sentence_says_what_is_wrong(words, why, tiny, tmp_path, monkeypatch, capsys):
    save(*tiny, tmp_path / "runs/one/last.pt")
    save(models.build(replace(tiny[0].config, method="simclr")), tiny[1], tmp_path / "vision.pt")
    (tmp_path / "data/empty").mkdir(parents=True)
    class_folders(tmp_path / "data/ids/test", ["n00000001", "n00000002"], range(1))
    monkeypatch.chdir(tmp_path)
    assert why in answer(evaluate.main, words, monkeypatch, capsys)
    assert not (tmp_path / "runs/one/results.jsonl").exists()


def test_slip_s_templates_of_imagenet(tiny, tmp_path, monkeypatch, capsys):
    """--templates and the paper's number, with three classes of ImageNet."""
    facts = testsets.protocols()["imagenet"]
    few = {name: facts[name][:3] for name in ("classes", "labels")}
    monkeypatch.setitem(testsets.protocols(), "imagenet", facts | few)
    save(*tiny, tmp_path / "runs/one/last.pt")
    class_folders(tmp_path / "data/imagenet/val", few["labels"], range(1))
    monkeypatch.chdir(tmp_path)
    _, lines, _ = run(monkeypatch, capsys, "--zeroshot", "imagenet", "--templates", 7)
    assert lines[2].startswith("zeroshot imagenet") and lines[2].split()[4] == "37.6"
    assert evaluate.read_results("runs/one")[0]["protocol"]["templates"] == 7
