"""Evaluation sets: prompts.json is the protocol's, all layouts hold the same set, and what is wrong is told."""
import copy
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import model as models
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent.parent
# ELEVATER's table (PROTOCOLS): classes, templates, train, test, metric
TABLE = """caltech-101 102 34 3060 6084 mean-per-class
cifar-10 10 18 50000 10000 accuracy
cifar-100 100 18 50000 10000 accuracy
country211 211 5 31650 21100 accuracy
dtd 47 8 1880 1880 accuracy
eurosat_clip 10 3 5000 5000 accuracy
fer-2013 7 6 28709 3589 accuracy
fgvc-aircraft-2013b-variants102 100 2 3334 3333 mean-per-class
food-101 101 1 75750 25250 accuracy
gtsrb 43 3 26640 12630 accuracy
hateful-memes 2 1 8500 500 roc_auc
kitti-distance 4 1 6347 711 accuracy
mnist 10 1 60000 10000 accuracy
oxford-flower-102 102 1 1020 6149 mean-per-class
oxford-iiit-pets 37 1 3680 3669 mean-per-class
patch-camelyon 2 1 262144 32768 accuracy
rendered-sst2 2 1 6920 1821 accuracy
resisc45_clip 45 18 3150 25200 accuracy
stanford-cars 196 8 8144 8041 accuracy
voc-2007-classification 20 1 2501 4952 11point_mAP
imagenet 1000 80 1281167 50000 accuracy"""


def test_prompts_are_the_protocols():
    facts = data.protocols()
    ours = [f"{name} {len(f['classes'])} {len(f['templates'])} {f['train']} {f['test']} {f['metric']}"
            for name, f in facts.items()]
    assert ours == TABLE.splitlines()
    for name, f in facts.items():
        assert all("{}" in template for template in f["templates"]), name
        spoken = [one if isinstance(one, str) else one[0] for one in f["classes"]]
        # CLIP calls two classes "missile" and two "sunglasses"
        assert len(spoken) - len(set(spoken)) == {"imagenet": 2}.get(name, 0), name
        assert "labels" not in f or len(f["labels"]) == len(f["classes"])
    assert facts["fer-2013"]["classes"][3] == ["happy", "smiling"] and facts["kitti-distance"]["squash"]
    assert facts["imagenet"]["labels"] == sorted(facts["imagenet"]["labels"])
    assert len(facts["imagenet"]["templates7"]) == 7
    folders = [folder for f in facts.values() for folder in f["folders"]]
    assert len(folders) == len(set(map(data._plain, folders))) + sum(
        len(f["folders"]) - len(set(map(data._plain, f["folders"]))) for f in facts.values())  # no name is two sets'


def test_the_paper_s_numbers():
    """Twenty numbers whose mean the paper prints too; every task and score is one that we print."""
    paper, known = data.prompts()["paper"], data.protocols()
    each = [paper["maskclip"][f"zeroshot {name}"][facts["metric"]] for name, facts in list(known.items())[:20]]
    assert round(sum(each) / 20, 1) == paper["maskclip"]["zeroshot icinw"]["mean of 20"] == 40.1
    rows = [[paper[m][f"{task} imagenet"]["accuracy"] for m in ("clip", "slip", "clip_mae", "maskclip")]
            for task in ("zeroshot", "linear", "finetune")]
    assert rows == [[37.6, 42.8, 42.1, 44.5], [66.5, 72.1, 68.5, 73.7], [82.3, 82.6, 83.2, 83.6]]
    assert [paper[m]["segment ade20k"]["mIoU"] for m in ("deit", "simclr", "mae", "clip", "slip", "maskclip")] == [
        47.4, 48.0, 46.5, 47.8, 48.5, 50.5]
    assert list(paper["maskclip"]["retrieval coco"].values()) == [41.4, 67.9, 77.5, 25.5, 49.7, 61.3]
    assert set(paper) <= {*models.METHODS, "deit"}
    assert {m: list(scores["cost"].values()) for m, scores in paper.items() if "cost" in scores} == dict(
        clip=[14, 1.0], slip=[30, 2.67], clip_mae=[16, 1.3], maskclip=[19, 1.75])
    for task in {task for scores in paper.values() for task in scores} - {"cost"}:
        assert task.split()[1] in {*known, "icinw", "flickr30k", "coco", "ade20k"}


@pytest.mark.peers
def test_imagenet_s_prompts_are_open_clips_and_its_ids_timms():
    open_clip = pytest.importorskip("open_clip")
    timm = pytest.importorskip("timm")
    facts = data.protocols()["imagenet"]
    assert facts["classes"] == list(open_clip.IMAGENET_CLASSNAMES)
    assert facts["templates"] == [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert facts["templates7"] == [template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    ids = Path(timm.__file__).parent / "data/_info/imagenet_synsets.txt"
    assert facts["labels"] == ids.read_text().split()


# ---------------------------------------------------------------- one set in every layout

def picture(k, i, size=(40, 32)):
    """The i-th picture of class k: noise around a colour of its own."""
    rng = np.random.default_rng([k, i])
    pixels = rng.integers(0, 256, 3) * 0.7 + rng.integers(0, 76, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def class_folders(home, folders, each=2):
    for k, folder in enumerate(folders):
        (home / folder).mkdir(parents=True)
        for i in range(each):
            (home / folder / f"{k}_{i}.png").write_bytes(encoded(picture(k, i)))


def zipped(path, names):
    """A zip, uncompressed as vision-datasets wants it, of pictures {name: (class, number)}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name, (k, i) in names.items():
            file.writestr(name, encoded(picture(k, i)))


def spoken(name):
    return [one if isinstance(one, str) else one[0] for one in data.protocols()[name]["classes"]]


def iris(home, labels, each=2, split="test"):
    """ELEVATER's first kind: lines ZIP@PATH LABEL."""
    names = {f"{split} set/{k}_{i}.png": (k, i) for k in range(len(labels)) for i in range(each)}
    zipped(home / f"{split}.zip", names)
    (home / f"{split}.txt").write_text("".join(f"{split}.zip@{name} {k}\n" for name, (k, _) in names.items()))
    (home / "labels.txt").write_text("".join(f"{label}\n" for label in labels))


def coco(home, labels, each=2, index="test.json"):
    """ELEVATER's second kind: a COCO json, ids from 1."""
    names = {f"{k}_{i}.png": (k, i) for k in range(len(labels)) for i in range(each)}
    zipped(home / "images.zip", names)
    images = [dict(id=n + 1, file_name=name, zip_file="images.zip") for n, name in enumerate(names)]
    notes = [dict(id=n + 1, image_id=n + 1, category_id=k + 1) for n, (k, _) in enumerate(names.values())]
    (home / index).write_text(json.dumps(dict(images=images, annotations=notes, categories=[
        dict(id=k + 1, name=label) for k, label in enumerate(labels)])))


def pickled_by_python_2(content):
    """Protocol 2 as Python 2 writes dicts of str, lists of int or str, and uint8 arrays: CIFAR's files."""
    def one(x):
        if isinstance(x, np.ndarray):
            return (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01" + one(len(x))
                    + one(x.shape[1]) + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
                    b"J\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", x.size) + x.tobytes() + b"tb")
        if isinstance(x, str):
            return b"U" + bytes([len(x)]) + x.encode()
        if isinstance(x, int):
            return b"J" + struct.pack("<i", x)
        return b"](" + b"".join(map(one, x)) + b"e"
    return b"\x80\x02}(" + b"".join(one(key) + one(x) for key, x in content.items()) + b"u."


@pytest.fixture(scope="module")
def tiny():
    """A model with random weights, and a tokenizer of few words."""
    facts = data.protocols()["imagenet"]
    tokenizer = Tokenizer.train(facts["classes"] + facts["templates"] * 20, 1200)
    torch.manual_seed(0)
    model = models.build(replace(models.PRESETS["tiny"], method="clip", vocab_size=len(tokenizer), depth=1,
                                 text_depth=1, text_width=32, image_size=32))
    return model.eval(), tokenizer


def scores(tiny, name, root):
    result = evaluate.zeroshot(*tiny, data.test_set(name, root))
    assert sum("order" in remark for remark in result["remarks"]) == 0
    return result["scores"], result["per_class"]


@pytest.mark.parametrize("name", ["eurosat_clip", "dtd", "fer-2013", "caltech-101"])
def test_an_index_of_lines_scores_as_class_folders(name, tmp_path, tiny):
    facts = data.protocols()[name]
    folders = [one if isinstance(one, str) else one[0] for one in facts.get("labels", facts["classes"])]
    class_folders(tmp_path / "a" / name / "test", [folder.replace(" ", "_") for folder in folders])
    elevater = tmp_path / "b" / next(folder for folder in facts["folders"] if "/" in folder)
    iris(elevater, spoken(name))
    assert scores(tiny, name, tmp_path / "a") == scores(tiny, name, tmp_path / "b")
    assert len(set(scores(tiny, name, tmp_path / "a")[1].values())) > 1  # not all alike: order shows


@pytest.mark.parametrize("name", ["resisc45_clip", "hateful-memes", "kitti-distance"])
def test_a_coco_index_scores_as_class_folders(name, tmp_path, tiny):
    facts = data.protocols()[name]
    numbers = name == "kitti-distance"  # its names are sentences
    class_folders(tmp_path / "a" / name / "test", map(str, range(4)) if numbers else spoken(name), each=3)
    coco(tmp_path / "b" / facts["folders"][-1], spoken(name), each=3,
         index="test.json" if name == "resisc45_clip" else "test_meta.json")
    one, other = (evaluate.zeroshot(*tiny, data.test_set(name, tmp_path / part)) for part in "ab")
    assert one["scores"] == other["scores"] and list(one["scores"]) == [facts["metric"]]
    assert one["protocol"]["squash"] is numbers


def test_several_labels_a_picture(tmp_path, tiny):
    """VOC: a comma in the index; in class folders, the same file in several."""
    names = spoken("voc-2007-classification")
    shows = {f"{n:03}.png": sorted({n % 20, n * 7 % 20}) for n in range(60)}
    zipped(tmp_path / "a/voc2007/test.zip", {name: (classes[0], n) for n, (name, classes) in enumerate(shows.items())})
    (tmp_path / "a/voc2007/test_ic.txt").write_text("".join(
        f"test.zip@{name} {','.join(map(str, classes))}\n" for name, classes in shows.items()))
    (tmp_path / "a/voc2007/labels.txt").write_text("\n".join(names))
    for n, (name, classes) in enumerate(shows.items()):
        for k in classes:
            (tmp_path / "b/voc2007/test" / names[k]).mkdir(parents=True, exist_ok=True)
            (tmp_path / "b/voc2007/test" / names[k] / name).write_bytes(encoded(picture(classes[0], n)))
    tests = data.test_set("voc2007", tmp_path / "a")
    assert tests.targets.shape == (60, 20)
    assert [row.nonzero().flatten().tolist() for row in tests.targets] == list(shows.values())
    one, other = scores(tiny, "voc2007", tmp_path / "a"), scores(tiny, "voc2007", tmp_path / "b")
    assert one[0]["11point_mAP"] == pytest.approx(other[0]["11point_mAP"], abs=1e-6) and list(one[0]) == ["11point_mAP"]


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar_s_own_files(hundred, tmp_path, tiny):
    name, key = ("cifar-100", "fine_labels") if hundred else ("cifar-10", "labels")
    own = sorted(spoken(name))  # CIFAR-100's order is alphabetical, ELEVATER's is not
    rows = [(k, i) for i in range(2) for k in range(len(own))]
    pixels = np.stack([np.asarray(picture(k, i, (32, 32))) for k, i in rows])
    folder = tmp_path / "a" / ("cifar-100-python" if hundred else "cifar-10/cifar-10-batches-py")
    folder.mkdir(parents=True)
    (folder / ("test" if hundred else "test_batch")).write_bytes(pickled_by_python_2(
        {"batch_label": "testing", key: [k for k, _ in rows],
         "data": pixels.transpose(0, 3, 1, 2).reshape(len(rows), -1)}))
    (folder / ("meta" if hundred else "batches.meta")).write_bytes(pickled_by_python_2(
        {"fine_label_names" if hundred else "label_names": [label.replace(" ", "_") for label in own]}))
    for n, (k, i) in enumerate(rows):
        place = tmp_path / "b" / name / "test" / own[k]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{n}.png").write_bytes(encoded(picture(k, i, (32, 32))))
    assert scores(tiny, name, tmp_path / "a") == scores(tiny, name, tmp_path / "b")
    whole = folder / ("test" if hundred else "test_batch")
    whole.write_bytes(whole.read_bytes()[:-9000])
    with pytest.raises(ValueError, match="does not hold CIFAR's batches whole"):
        data.test_set(name, tmp_path / "a")
    whole.write_bytes(pickle.dumps(evil))
    with pytest.raises(ValueError, match="no plain value"):
        data.test_set(name, tmp_path / "a")


def evil():
    raise AssertionError("this must not run")


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_s_own_files(packed, tmp_path, tiny):
    rows = [(k, i) for i in range(2) for k in range(10)]
    pixels = np.stack([np.asarray(picture(k, i, (28, 28)).convert("L")) for k, i in rows])
    folder, end = tmp_path / "a/mnist/MNIST/raw", ".gz" * packed
    folder.mkdir(parents=True)
    for what, content in (("images-idx3", struct.pack(">4I", 2051, 20, 28, 28) + pixels.tobytes()),
                          ("labels-idx1", struct.pack(">2I", 2049, 20) + bytes(k for k, _ in rows))):
        (folder / f"t10k-{what}-ubyte{end}").write_bytes(gzip.compress(content) if packed else content)
    for n, (k, _) in enumerate(rows):
        place = tmp_path / "b/mnist/test" / str(k)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{n}.png").write_bytes(encoded(Image.fromarray(pixels[n])))
    assert np.array_equal(np.stack(data.test_set("mnist", tmp_path / "a").pictures), pixels)
    assert scores(tiny, "mnist", tmp_path / "a") == scores(tiny, "mnist", tmp_path / "b")
    (folder / f"t10k-images-idx3-ubyte{end}").write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match="MNIST's t10k files are damaged"):
        data.test_set("mnist", tmp_path / "a")
    (folder / f"t10k-images-idx3-ubyte{end}").write_bytes(gzip.compress(content)[:-9] if packed else b"12")
    with pytest.raises(ValueError, match="damaged"):
        data.test_set("mnist", tmp_path / "a")


# ---------------------------------------------------------------- ImageNet

def meta_mat(ids):
    """What matters of meta.mat: a header, and one packed element with the ids in UTF-16."""
    inside = b"".join(struct.pack("<2I", 4, 18) + one.encode("utf-16-le") + b"\0" * 6 for one in ids)
    packed = zlib.compress(struct.pack("<2I", 14, len(inside)) + inside)
    return b"MATLAB 5.0".ljust(128) + struct.pack("<2I", 15, len(packed)) + packed


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """ImageNet's validation set with one tiny picture a class: sorted into folders, and flat with the kit's labels."""
    root, ids = tmp_path_factory.mktemp("imagenet"), data.protocols()["imagenet"]["labels"]
    kit = ["n02119789", "n02100735", *sorted(set(ids) - {"n02119789", "n02100735"}, key=lambda one: one[::-1])]
    order = np.random.default_rng(0).permutation(1000)
    flat = root / "flat/imagenet/val"
    flat.mkdir(parents=True)
    for n, k in enumerate(order, 1):
        content, name = encoded(picture(k, 0, (16, 12))), f"ILSVRC2012_val_{n:08}.JPEG"
        (flat / name).write_bytes(content)
        place = root / "sorted/imagenet/val" / ids[k]
        place.mkdir(parents=True)
        (place / name).write_bytes(content)
    data_folder = root / "flat/imagenet/ILSVRC2012_devkit_t12/data"
    data_folder.mkdir(parents=True)
    (data_folder / "meta.mat").write_bytes(meta_mat(kit + ["n00001740"] * 2))
    (data_folder / "ILSVRC2012_validation_ground_truth.txt").write_text(
        "".join(f"{kit.index(ids[k]) + 1}\n" for k in order))
    return root


def test_imagenet_flat_is_imagenet_sorted(imagenet):
    flat, ordered = (data.test_set("imagenet", imagenet / part) for part in ("flat", "sorted"))
    assert ordered.targets.tolist() == list(range(1000)) and ordered.names[0] == ["tench"]
    assert dict(zip([p.name for p in flat.pictures], flat.targets.tolist(), strict=True)) == dict(
        zip([p.name for p in ordered.pictures], ordered.targets.tolist(), strict=True))
    assert ordered.remarks == ("1,000 test pictures, the protocol has 50,000",)


def test_imagenet_with_something_missing(imagenet, tmp_path):
    home = tmp_path / "imagenet"
    (home / "val").mkdir(parents=True)
    for n in (1, 2):
        (home / f"val/ILSVRC2012_val_{n:08}.JPEG").write_bytes(encoded(picture(0, n)))
    with pytest.raises(FileNotFoundError, match="unpack ILSVRC2012_devkit_t12.tar.gz there"):
        data.test_set("imagenet", tmp_path)
    kit = imagenet / "flat/imagenet/ILSVRC2012_devkit_t12/data"
    (home / "data").mkdir()
    (home / "data/ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n")
    (home / "data/meta.mat").write_bytes((kit / "meta.mat").read_bytes())
    with pytest.raises(ValueError, match="holds 2 pictures, and the ground truth .* 3 labels"):
        data.test_set("imagenet", tmp_path)
    (home / "data/ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n")
    with pytest.raises(ValueError, match="no picture of 998 of 1000 classes: tench"):
        data.test_set("imagenet", tmp_path)
    for content, why in (((kit / "meta.mat").read_bytes()[:-99], "damaged"),
                         (meta_mat(["n00000001"]), "does not list ImageNet's 1,000 classes"),
                         (meta_mat(["n02119789", "n02100735", "n00000001"]), "does not list ImageNet's 1,000 classes")):
        (home / "data/meta.mat").write_bytes(content)
        with pytest.raises(ValueError, match=why):
            data.test_set("imagenet", tmp_path)


@pytest.mark.peers
@pytest.mark.parametrize("packed", [False, True])
def test_meta_mat_of_scipy(packed, tmp_path):
    io_ = pytest.importorskip("scipy.io")
    ids = data.protocols()["imagenet"]["labels"]
    kit = ["n02119789", "n02100735", *[one for one in ids[::-1] if one not in ("n02119789", "n02100735")]]
    rows = [(n + 1, one, f"words of {one[::-1]}", float(n)) for n, one in enumerate([*kit, "n00001740"])]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("height", "O")])
    io_.savemat(tmp_path / "meta.mat", dict(synsets=synsets[:, None]), do_compression=packed)
    assert data._wordnet_ids(tmp_path / "meta.mat", ids) == kit


# ---------------------------------------------------------------- what is wrong is told

def test_a_set_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(
            "no test set 'imagenet': looked for ELEVATER's index and zips, CIFAR's batches, MNIST's idx files, "
            f"ImageNet's val/ with the development kit or class folders with pictures in {tmp_path}/imagenet")):
        data.test_set("imagenet", tmp_path)
    with pytest.raises(FileNotFoundError, match="no test set 'mine': looked for class folders with pictures in"):
        data.test_set("mine", tmp_path)
    class_folders(tmp_path / "mine/test", ["a", "b"])
    with pytest.raises(FileNotFoundError, match="no train set 'mine'"):
        data.test_set("mine", tmp_path, "train")


def test_classes_that_are_missing_unknown_or_in_another_order(tmp_path):
    labels = spoken("eurosat_clip")
    home = tmp_path / "a/eurosat"
    iris(home, labels)
    (home / "labels.txt").write_text("\n".join([labels[1], labels[0], *labels[2:]]))
    with pytest.raises(ValueError, match="in another order than the protocol's: number 0 is 'forest' here and 'annual"):
        data.test_set("eurosat_clip", tmp_path / "a")
    (home / "labels.txt").write_text("\n".join(["Acker", *labels[1:]]))
    assert "order of 1 of 10 classes was not checked" in data.test_set("eurosat_clip", tmp_path / "a").remarks[0]
    (home / "labels.txt").unlink()
    assert "no labels.txt" in data.test_set("eurosat_clip", tmp_path / "a").remarks[0]
    (home / "labels.txt").write_text("\n".join(labels[:9]))
    with pytest.raises(ValueError, match="names 9 classes: the protocol has 10"):
        data.test_set("eurosat_clip", tmp_path / "a")
    (home / "labels.txt").write_text("\n".join(labels))
    lines = (home / "test.txt").read_text().splitlines()
    (home / "test.txt").write_text("\n".join(lines[:-2]))  # the last class has no picture
    with pytest.raises(ValueError, match="no picture of 1 of 10 classes: lake or sea"):
        data.test_set("eurosat_clip", tmp_path / "a")
    (home / "test.txt").write_text("\n".join([*lines[:-1], lines[-1].replace(" 9", " 10")]))
    with pytest.raises(ValueError, match=r"9_1.png has the labels \[10\], of 10 classes counted from 0"):
        data.test_set("eurosat_clip", tmp_path / "a")
    (home / "test.txt").write_text("\n".join([lines[0] + ",3", *lines[1:]]))
    with pytest.raises(ValueError, match=r"0_0.png has the labels \[0, 3\], of 10 classes"):
        data.test_set("eurosat_clip", tmp_path / "a")
    (home / "test.txt").write_text("\n".join([*lines, "test.zip@nowhere.png 3"]))
    with pytest.raises(ValueError, match="test.zip does not hold nowhere.png, which .*test.txt names"):
        data.test_set("eurosat_clip", tmp_path / "a")
    (home / "test.txt").write_text("\n".join([*lines, "what is this"]))
    with pytest.raises(ValueError, match="test.txt, line 21: not ZIP@PATH LABEL"):
        data.test_set("eurosat_clip", tmp_path / "a")
    (home / "test.txt").write_text("\n".join(lines))
    (home / "test.zip").write_bytes((home / "test.zip").read_bytes()[:-50])
    data._zip.cache_clear()
    with pytest.raises(ValueError, match="test.zip is no zip, or is cut off"):
        data.test_set("eurosat_clip", tmp_path / "a")

    folders = data.protocols()["eurosat_clip"]["labels"]
    class_folders(tmp_path / "b/eurosat/test", folders[:-1])
    with pytest.raises(ValueError, match="9 classes, and the protocol has 10; missing: lake or sea"):
        data.test_set("eurosat_clip", tmp_path / "b")
    class_folders(tmp_path / "b/eurosat/test", ["Moon"])
    with pytest.raises(ValueError, match="1 of 10 classes are unknown to prompts.json, the first is 'Moon'"):
        data.test_set("eurosat_clip", tmp_path / "b")
    (tmp_path / "b/eurosat/test/Moon").rename(tmp_path / "b/eurosat/test/SeaLake")
    assert data.test_set("eurosat_clip", tmp_path / "b").names[9] == ["lake or sea"]
    for file in (tmp_path / "b/eurosat/test/River").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="no pictures of 1 classes in .*: River"):
        data.test_set("eurosat_clip", tmp_path / "b")


def test_a_coco_index_in_another_order(tmp_path):
    labels = spoken("resisc45_clip")
    coco(tmp_path / "resisc45", [*labels[:7], labels[8], labels[7], *labels[9:]])
    with pytest.raises(ValueError, match="another order .*: number 7 is 'circular farmland' here and 'church' in"):
        data.test_set("resisc45", tmp_path)
    (tmp_path / "resisc45/test.json").write_text('{"images": 3, "categories": []}')
    with pytest.raises(ValueError, match="no index of pictures and categories in COCO's form"):
        data.test_set("resisc45", tmp_path)


def test_names_of_class_folders(tmp_path):
    class_folders(tmp_path / "mine/test", ["n01", "n02"])
    assert data.test_set("mine", tmp_path).names == [["n01"], ["n02"]]
    (tmp_path / "mine/test/words.txt").write_text("n02\ta dog, hound\nn01\tcat\n")
    assert data.test_set("mine", tmp_path).names == [["cat"], ["a dog"]]
    names = tmp_path / "names.txt"
    names.write_text("n02\tbird\nn01\tfish\n")
    assert data.test_set("mine", tmp_path, names=names).names == [["fish"], ["bird"]]
    for wrong, why in (("fish\nbird\n", "no line FOLDER<tab>NAME"), ("n01\tfish\n", "not hold the same classes: n02")):
        names.write_text(wrong)
        with pytest.raises(ValueError, match=why):
            data.test_set("mine", tmp_path, names=names)
    with pytest.raises(ValueError, match="--names is for class folders of your own"):
        class_folders(tmp_path / "mnist/test", map(str, range(10)))
        data.test_set("mnist", tmp_path, names=names)


def test_caltech_s_faces(tmp_path):
    """Folders by CLIP's meaning of their names; in an index either order, as ELEVATER's is the other."""
    facts = data.protocols()["caltech-101"]
    folders = [one if isinstance(one, str) else one[0] for one in facts["labels"]]
    class_folders(tmp_path / "a/caltech101/test", folders, each=1)
    tests = data.test_set("caltech101", tmp_path / "a")
    said = {path.parent.name: tests.names[k][0] for path, k in zip(tests.pictures, tests.targets.tolist(), strict=True)}
    assert (said["Faces"], said["Faces_easy"]) == ("off-center face", "centered face") and len(said) == 102
    folders[37:39] = folders[38:36:-1]
    iris(tmp_path / "b/caltech101", folders, each=1)
    assert data.test_set("caltech101", tmp_path / "b").targets.tolist() == list(range(102))


def test_the_test_split_is_taken_before_the_validation_split(tmp_path):
    for split, each in (("train", 1), ("val", 2), ("test", 3)):
        class_folders(tmp_path / "dtd" / split, spoken("dtd"), each)
    assert len(data.test_set("dtd", tmp_path).pictures) == 3 * 47
    assert len(data.test_set("dtd", tmp_path, "train").pictures) == 47


def test_wordnet_ids_are_no_names(tmp_path, tiny):
    class_folders(tmp_path / "mine/val", ["n01440764", "n01443537"])
    class_folders(tmp_path / "mine/train", ["n01440764", "n01443537"])
    with pytest.raises(ValueError, match="the classes are WordNet ids: give words.txt or --names"):
        evaluate.zeroshot(*tiny, data.test_set("mine", tmp_path))
    assert evaluate.probe_sets("mine", tmp_path)[1].names == [["n01440764"], ["n01443537"]]  # no words are needed
    for folder, name in (("mine/val", "cat"), ("mine", "fish")):
        (tmp_path / folder / "words.txt").write_text(f"n01440764\t{name}\nn01443537\tdog\n")
        (tmp_path / folder / "templates.txt").write_text(f"{name}: {{}}\n")
    for name in ("cat", "fish"):  # among the class folders, or in the folder of the set
        tests = data.test_set("mine", tmp_path)
        assert tests.names == [[name], ["dog"]] and tests.templates == [f"{name}: {{}}"]
        evaluate.zeroshot(*tiny, tests)
        for file in ("words.txt", "templates.txt"):
            (tmp_path / "mine/val" / file).unlink(missing_ok=True)


def test_pictures_in_ppm_and_labels_that_are_numbers(tmp_path, tiny):
    """GTSRB is distributed so."""
    facts = data.protocols()["gtsrb"]
    for k in range(43):
        (tmp_path / f"a/gtsrb/test/{k:05}").mkdir(parents=True)
        picture(k, 0).save(tmp_path / f"a/gtsrb/test/{k:05}/{k}.ppm")
        (tmp_path / "b").mkdir(exist_ok=True)
    home = tmp_path / "b" / facts["folders"][-1]
    iris(home, [str(k) for k in range(43)], each=1)
    one, other = (data.test_set("gtsrb", tmp_path / part) for part in "ab")
    assert one.remarks[0] == "the classes are called by numbers: their order was not checked"
    assert other.remarks[0].startswith("the order of 43 of 43 classes was not checked")
    assert evaluate.zeroshot(*tiny, one)["per_class"] == evaluate.zeroshot(*tiny, other)["per_class"]


def test_folders_that_are_numbers_from_one(tmp_path):
    """Flowers: 1 to 102, sorted as numbers; one that is left out moves no other."""
    class_folders(tmp_path / "flowers/test", map(str, range(1, 103)), each=1)
    tests = data.test_set("flowers", tmp_path)
    assert all(int(path.parent.name) == k + 1 for path, k in zip(tests.pictures, tests.targets.tolist(), strict=True))
    shutil.rmtree(tmp_path / "flowers/test/1")
    with pytest.raises(ValueError, match="101 classes, and the protocol has 102; missing: pink primrose"):
        data.test_set("flowers", tmp_path)


def test_another_project_s_list_is_passed_over(tmp_path):
    names = spoken("voc-2007-classification")
    iris(tmp_path / "voc2007", names)
    (tmp_path / "voc2007/test.txt").rename(tmp_path / "voc2007/test_ic.txt")
    (tmp_path / "voc2007/test.txt").write_text("000001\n000002\n")
    assert data.test_set("voc2007", tmp_path).targets.sum(0).tolist() == [2] * 20
    class_folders(tmp_path / "mine/test", ["a", "b"])
    (tmp_path / "mine/test.json").write_text('{"note": "not an index"}')
    assert data.test_set("mine", tmp_path).names == [["a"], ["b"]]


def test_pictures_are_seen_as_the_format_wants(tmp_path, tiny, monkeypatch):
    """Bicubic or bilinear, cropped or squashed, MoCo v3's wider view: against Pillow's own calls."""
    image = picture(0, 0, (100, 75))
    image.save(tmp_path / "a.png")
    config = tiny[0].config

    def pixels(view):
        return np.asarray(view(data.load_picture(tmp_path / "a.png"))).tolist()

    def cropped(short, resample):
        resized = image.resize((short * 100 // 75, short), resample)
        x, y = round((resized.width - 32) / 2), round((resized.height - 32) / 2)
        return np.asarray(resized.crop((x, y, x + 32, y + 32))).tolist()
    assert pixels(evaluate.evaluation_view(config)) == cropped(32, Image.BICUBIC)
    assert pixels(evaluate.evaluation_view(replace(config, interpolation="bilinear"))) == cropped(32, Image.BILINEAR)
    squashed = np.asarray(image.resize((32, 32), Image.BICUBIC)).tolist()
    assert pixels(evaluate.evaluation_view(config, squash=True)) == squashed
    views, encode = [], evaluate.encode_pictures
    monkeypatch.setattr(evaluate, "encode_pictures", lambda *given: views.append(given[3]) or encode(*given))
    tests = data.TestSet("x", tmp_path, [tmp_path / "a.png"], torch.tensor([0]), [["a"], ["b"]], ["{}"], squash=True)
    evaluate.zeroshot(*tiny, tests)
    evaluate.linear_mocov3(tiny[0], (tests, tests), epochs=1)
    assert [pixels(view) for view in views] == [squashed, cropped(36, Image.BILINEAR)]


@pytest.mark.parametrize("name", ["voc2007", "memes"])
def test_scores_over_pictures_rank_the_softmax(name, tmp_path, tiny):
    """11-point mAP and ROC-AUC compare pictures with each other: there the softmax is another order than the cosine."""
    names = spoken(data.known_name(name))
    iris(tmp_path / name, names, each=60 if name == "memes" else 6)
    if name == "voc2007":
        (tmp_path / name / "test.txt").rename(tmp_path / name / "test_ic.txt")
    tests = data.test_set(name, tmp_path)
    cosine = evaluate.encode_unit(tiny[0], tests.pictures) @ evaluate.zeroshot_classifier(
        *tiny, names, tests.templates).T
    exps = np.exp(100 * cosine.double().numpy())
    metric = evaluate.METRICS[tests.metric]
    right, wrong = metric(exps / exps.sum(1, keepdims=True), tests.targets), metric(cosine, tests.targets)
    assert evaluate.zeroshot(*tiny, tests)["scores"][tests.metric] == pytest.approx(right, abs=1e-6)
    assert abs(right - wrong) > 1e-3


def test_a_picture_that_cannot_be_read_is_named(tmp_path, tiny):
    iris(tmp_path / "eurosat", spoken("eurosat_clip"))
    zipped(tmp_path / "eurosat/test.zip", {f"test set/{k}_{i}.png": (k, i) for k in range(10) for i in range(2)})
    with zipfile.ZipFile(tmp_path / "eurosat/test.zip") as file:
        offset = file.getinfo("test set/4_1.png").header_offset
    with open(tmp_path / "eurosat/test.zip", "r+b") as file:
        file.seek(offset + 200)
        file.write(b"damage")
    data._zip.cache_clear()
    with pytest.raises(ValueError, match=r"cannot read the picture .*test.zip@test set/4_1.png"):
        evaluate.zeroshot(*tiny, data.test_set("eurosat_clip", tmp_path))


def test_karpathy_s_files_as_they_are_called(tmp_path):
    """dataset_coco.json with its pictures in val2014/, and dataset_flickr30k.json with them in flickr30k-images/."""
    for name, part, path in (("coco", {"filepath": "val2014"}, "val2014"), ("flickr30k", {}, "flickr30k-images")):
        (tmp_path / name / path).mkdir(parents=True)
        (tmp_path / name / path / "7.jpg").write_bytes(b"")
        (tmp_path / name / f"dataset_{name}.json").write_text(json.dumps(dict(images=[
            dict(filename="7.jpg", split="test", sentences=[dict(raw="a dog"), dict(raw="it runs")], **part),
            dict(filename="8.jpg", split="restval", sentences=[dict(raw="a cat")], **part)])))
        paths, texts, owners = data.karpathy(evaluate.find(name, tmp_path, "val"))
        assert paths == [tmp_path / name / path / "7.jpg"] and texts == ["a dog", "it runs"] and owners == [0, 0]


# ---------------------------------------------------------------- the commands

def run(folder, *arguments):
    """python evaluate.py ARGUMENTS in a folder."""
    return subprocess.run([sys.executable, HERE / "evaluate.py", *map(str, arguments)], capture_output=True, text=True,
                          cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "2"})


def save(model, tokenizer, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(model=model.state_dict(), model_config=asdict(model.config),
                    tokenizer=[" ".join(pair) for pair in tokenizer.merges]), path)


@pytest.mark.slow
def test_zeroshot_imagenet_as_typed(imagenet, tmp_path, tiny):
    """The mission's command in a folder with runs/ and data/, on both layouts; the second time reads its classifier."""
    save(*tiny, tmp_path / "runs/one/last.pt")
    said = []
    for part in ("sorted", "flat"):
        (tmp_path / "data").unlink(missing_ok=True)
        (tmp_path / "data").symlink_to(imagenet / part)
        done = run(tmp_path, "--zeroshot", "imagenet")
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    line = next(line for line in said[0].splitlines() if line.startswith("zeroshot imagenet"))
    score = float(line.split()[3])
    kept = evaluate.Cache(tmp_path / "runs/one/last.pt")  # its classifier is there: text is not encoded again
    tests = data.test_set("imagenet", imagenet / "sorted")
    expected = evaluate.zeroshot(tiny[0], None, tests, kept)["scores"]["accuracy"]
    assert score == pytest.approx(100 * expected, abs=0.051)
    assert line.endswith("chance 0.1; 1,000 pictures of 1,000 classes") and line.split()[4] == "37.6"  # the paper's
    assert said[0] == said[1] and "zeroshot imagenet: 1,000 test pictures, the protocol has 50,000" in said[0]
    assert len(list((tmp_path / "runs/one").glob("last.pt.classifier-*.pt"))) == 1
    records = json.loads((tmp_path / "runs/one/results.json").read_text())
    assert [(r["task"], r["protocol"]["templates"], r["protocol"]["pictures"]) for r in records] == [
        ("zeroshot imagenet", 80, 1000)] * 2  # one for each place
    assert records[0]["sha256"] == hashlib.sha256((tmp_path / "runs/one/last.pt").read_bytes()).hexdigest()
    assert {"commit", "torch", "date", "checkpoint", "scores", "remarks"} <= records[0].keys()
    assert records[0]["scores"]["accuracy"] == pytest.approx(expected)

    done = run(tmp_path, "--zeroshot", "imagenet-1k", "--templates", 7)
    assert done.returncode == 0 and "zeroshot imagenet" in done.stdout
    records = json.loads((tmp_path / "runs/one/results.json").read_text())
    assert [r["protocol"]["templates"] for r in records] == [80, 80, 7]
    done = run(tmp_path, "--zeroshot", "imagenet-1k", "--templates", 7)
    assert len(json.loads((tmp_path / "runs/one/results.json").read_text())) == 3


def test_icinw_with_some_sets_missing_and_two_checkpoints(tmp_path, tiny):
    model, tokenizer = tiny
    save(model, tokenizer, tmp_path / "runs/one/last.pt")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.visual.cls_token += 3
    save(other, tokenizer, tmp_path / "runs/two/last.pt")
    iris(tmp_path / "data/classification/eurosat_clip_20210930", spoken("eurosat_clip"))
    class_folders(tmp_path / "data/mnist/test", map(str, range(10)))
    class_folders(tmp_path / "data/pets/test", ["Abyssinian", "Moon"])
    done = run(tmp_path, "--zeroshot", "icinw", "--checkpoint", "runs/one/last.pt", "runs/two/last.pt")
    assert done.returncode == 1  # pets are damaged
    assert re.search(r"error: oxford-iiit-pets: .*1 of 2 classes are unknown .*'Moon'", done.stderr)
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == ["runs/one/last.pt", "runs/two/last.pt"])
    table = {line.split()[1]: [float(x) for x in re.findall(r"-?\d+\.\d", line.partition("chance")[0])]
             for line in lines[start + 1:start + 4]}
    assert list(table) == ["eurosat_clip", "mnist", "icinw"] and all(len(row) == 2 for row in table.values())
    means = [(a + b) / 2 for a, b in zip(table["eurosat_clip"], table["mnist"], strict=True)]
    assert table["icinw"] == pytest.approx(means, abs=0.1)
    assert "partial mean" in lines[start + 3] and "2 of 20 data sets" in lines[start + 3]
    for name, column in (("one", 0), ("two", 1)):
        records = json.loads((tmp_path / "runs" / name / "results.json").read_text())
        assert [(r["task"], 100 * sum(r["scores"].values())) for r in records] == [
            (f"zeroshot {task}", pytest.approx(row[column], abs=0.051)) for task, row in table.items()]
    assert done.stdout.count("missing: ") == 17
    assert "missing: food-101: data/food-101, data/food101, data/classification/food_101_2021" in done.stdout


def test_a_model_without_text_and_a_file_that_is_none_beside_one(coloured, tiny, tmp_path):
    """A column each, of equal names too; the numbers that there are are printed, and the exit status tells."""
    save(*tiny, tmp_path / "a/last.pt")
    save(models.build(replace(tiny[0].config, method="simclr")), tiny[1], tmp_path / "b/a/last.pt")
    (tmp_path / "bad.pt").touch()
    shutil.copytree(coloured / "mine", tmp_path / "data/mine")
    (tmp_path / "data/mine/test/a/30.png").rename(tmp_path / "data/mine/30.png")
    for part in ("images", "labels"):
        (tmp_path / "dense" / part).mkdir(parents=True)
        Image.new("L", (32, 32), 1).save(tmp_path / "dense" / part / "0.png")
    (tmp_path / "dense/classes.txt").write_text("a\nb\n")
    done = run(tmp_path, "--zeroshot", "data/mine/test", "--linear", "mine", "--dense", "dense", "--checkpoint",
               "a/last.pt", "bad.pt", "b/a/last.pt", "a/last.pt")
    assert done.returncode == 1
    for why in ("--zeroshot needs a text encoder, and b/a/last.pt (simclr) has none", "bad.pt is not a checkpoint"):
        assert why in done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[2] == ["a/last.pt", "b/a/last.pt"]
    assert [row[:2] for row in rows[3:8]] == [["zeroshot", "data/mine/test"], ["mean", "per"], ["dense", "dense"],
                                              ["pixel", "accuracy"], ["linear", "mine"]]
    assert rows[3][4] == rows[5][4] == "-" and "-" not in rows[7][:5] and "39 pictures" in done.stdout


@pytest.mark.parametrize("words,why", [
    (["--zeroshot", "nowhere"], "no test set 'nowhere': looked for class folders"),
    (["--zeroshot", "icinw"], "none of ICinW's data sets is under data"),
    (["--zeroshot", "empty"], "no test set 'empty'"),
    (["--linear", "empty"], "no train set 'empty'"),
    (["--retrieval", "empty"], "no karpathy.json"),
    (["--zeroshot", "mnist", "--names", "nowhere.txt"], "no test set 'mnist'"),
    (["--zeroshot", "one", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
    (["--zeroshot", "one", "--checkpoint", "empty.pt"], "empty.pt is not a checkpoint"),
    (["--zeroshot", "one", "--checkpoint", "data"], "data is a folder without model.safetensors"),
    (["--zeroshot", "one", "--templates", "8"], "invalid choice"),
    (["--templates", "7"], "nothing to do"), (["--linear", "one", "--templates", "7"], "--templates is for --zeroshot"),
    (["--zeroshot", "mnist", "--templates", "7"], "--templates 7 is for --zeroshot imagenet"),
    (["--linear", "one", "--protocol", "mocov3", "--lr", "nan"], "--lr must be more than 0"),
    (["--linear", "one", "--lr", "7"], "--lr is for --protocol mocov3"),
    (["--zeroshot", "one", "--features", "both"], "--features is for --linear"),
    (["--linear", "one", "--protocol", "mocov3", "--epochs", "-3"], "--epochs must be more than 0"),
    (["--linear", "one", "--protocol", "mocov3", "--lr", "0"], "--lr must be more than 0"),
    (["--heatmap", "a.png", "a", "--checkpoint", "a", "b"], "--heatmap draws one")])
def test_one_sentence_says_what_is_wrong(words, why, tiny, tmp_path, monkeypatch, capsys):
    save(*tiny, tmp_path / "runs/one/last.pt")
    (tmp_path / "data/empty").mkdir(parents=True)
    (tmp_path / "empty.pt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert why in capsys.readouterr().err + str(ended.value) and ended.value.code != 0
    assert not (tmp_path / "runs/one/results.json").exists()


# ---------------------------------------------------------------- the linear probe

@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """30 pictures of each of 4 colours to train on, 10 to test on."""
    home = tmp_path_factory.mktemp("coloured")
    for split, numbers in (("train", range(30)), ("test", range(30, 40))):
        for k, name in enumerate("abcd"):
            (home / "mine" / split / name).mkdir(parents=True)
            for i in numbers:  # the middle of the picture has its colour, the rest is anything
                scene = picture(k, i)
                scene.paste(("red", "green", "blue", "yellow")[k], (8, 6, 34, 28))
                scene.save(home / "mine" / split / name / f"{i}.png")
    return home


@pytest.mark.parametrize("features", ["cls", "patches", "both"])
def test_the_penalty_is_chosen_as_clip_does(features, coloured, tiny, monkeypatch):
    fitted, fit = [], evaluate.logistic_regression
    monkeypatch.setattr(evaluate, "logistic_regression",
                        lambda x, y, classes, penalty: fitted.append((x, y, penalty)) or fit(x, y, classes, penalty))
    result = evaluate.linear(tiny[0], evaluate.probe_sets("mine", coloured), features=features)
    assert result["scores"]["top-1"] == 1.0
    *search, (x, y, last) = fitted
    assert all(len(rows) == 96 and torch.bincount(labels).tolist() == [24] * 4 for rows, labels, _ in search)
    penalties = [round(np.log10(penalty), 3) for _, _, penalty in search]
    assert penalties[:7] == [-6, -4, -2, 0, 2, 4, 6] and 11 <= len(penalties) <= 15
    assert len(x) == 120 and result["protocol"]["penalty"] == last
    images = data.normalize(torch.stack([torch.from_numpy(np.array(evaluate.evaluation_view(tiny[0].config)(
        data.load_picture(path)))) for path in evaluate.probe_sets("mine", coloured)[0].pictures[:2]]))
    with torch.no_grad():
        tokens = tiny[0].visual(images)
    cls, patches = tokens[:, 0], tokens[:, 1:].mean(1)
    expected = dict(cls=cls, patches=patches, both=torch.cat([cls, patches], 1))[features]
    assert torch.allclose(x[:2], expected, atol=1e-5)


def test_mocov3_s_probe_learns_and_goes_on(coloured, tiny, tmp_path, monkeypatch):
    """Four epochs, and two, a kill, and two, are one to the bit; the crops are pictures of the class."""
    model, sets = tiny[0], evaluate.probe_sets("mine", coloured)
    heads, write = {}, evaluate.Cache.write

    def keep(self, what, key, value):
        heads[self.path.parent.name, value["epoch"]] = {name: x.clone() for name, x in value["head"].items()}
        write(self, what, key, value)
        if self.path.parent.name == "killed" and value["epoch"] == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(evaluate.Cache, "write", keep)
    for name in ("whole", "killed"):
        save(*tiny, tmp_path / name / "last.pt")
    settings = dict(epochs=4, batch_size=32, lr=0.05)
    whole = evaluate.linear_mocov3(model, sets, evaluate.Cache(tmp_path / "whole/last.pt"), **settings)
    with pytest.raises(KeyboardInterrupt):
        evaluate.linear_mocov3(model, sets, evaluate.Cache(tmp_path / "killed/last.pt"), **settings)
    again = evaluate.linear_mocov3(model, sets, evaluate.Cache(tmp_path / "killed/last.pt"), **settings)
    assert whole["scores"] == again["scores"] and whole["scores"]["top-1"] > 0.8
    assert [key for key in heads if key[0] == "killed"] == [("killed", n) for n in (1, 2, 3, 4)]
    assert all(torch.equal(heads["whole", 4][name], x) for name, x in heads["killed", 4].items())


def test_mocov3_s_recipe(coloured, tiny, monkeypatch):
    """Batch, rate, momentum, decay, head and schedule as PROTOCOLS has them; each picture at most once an epoch."""
    made, rates, shown = [], [], []

    class SGD(torch.optim.SGD):
        def __init__(self, parameters, lr, **settings):
            parameters = list(parameters)
            made.append((lr, settings, [p.detach().clone() for p in parameters]))
            super().__init__(parameters, lr, **settings)

        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()
    crops = evaluate._Crops.__getitem__
    monkeypatch.setattr(evaluate._Crops, "__getitem__", lambda self, key: shown.append(key) or crops(self, key))
    monkeypatch.setattr(torch.optim, "SGD", SGD)
    sets = evaluate.probe_sets("mine", coloured)
    result = evaluate.linear_mocov3(tiny[0], sets, epochs=3, batch_size=50)
    (lr, settings, (weight, bias)), = made
    assert lr == pytest.approx(3 * 50 / 256) and settings == dict(momentum=0.9)
    assert 0.009 < weight.std() < 0.011 and abs(weight.mean()) < 0.002 and not bias.any()
    assert rates == pytest.approx([lr * 0.5 * (1 + np.cos(np.pi * epoch / 3)) for epoch in range(3) for _ in range(2)])
    for epoch in range(3):
        keys = [i for e, i in shown if e == epoch]
        assert len(keys) == len(set(keys)) == 100  # of 120, two batches of 50
    assert len({tuple(i for e, i in shown if e == epoch) for epoch in range(3)}) == 3
    assert result["protocol"]["epochs"] == 3 and result["protocol"]["lr"] == lr
    one, other = (crops(evaluate._Crops(sets[0], 32), (epoch, 7))[0] for epoch in (0, 1))
    assert not torch.equal(one, other)  # another crop at each visit
    assert torch.equal(one, crops(evaluate._Crops(sets[0], 32), (0, 7))[0])


def test_mocov3_s_kept_head_knows_its_labels(coloured, tiny, tmp_path):
    save(*tiny, tmp_path / "last.pt")
    cache, (train, tests) = evaluate.Cache(tmp_path / "last.pt"), evaluate.probe_sets("mine", coloured)
    wrong = replace(train, targets=(train.targets + 1) % 4)
    first, again = (evaluate.linear_mocov3(tiny[0], (one, tests), cache, epochs=2, batch_size=32, lr=0.05)
                    for one in (wrong, train))
    assert first["scores"]["top-1"] < 0.3 and again["scores"]["top-1"] > 0.7


def test_a_probe_of_several_labels_ranks_what_it_fitted(tmp_path, tiny, monkeypatch):
    """One regression per class: their softmax would be another order of the pictures."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(400, 8))).float()
    y = (x @ torch.from_numpy(rng.normal(size=(8, 20))).float() > 2).long()
    monkeypatch.setattr(evaluate, "encode_pictures", lambda encode, pictures, *_: x[pictures])
    sets = [data.TestSet("voc", tmp_path, list(part), y[list(part)], [[str(k)] for k in range(20)], [], "11point_mAP")
            for part in (range(300), range(300, 400))]
    result = evaluate.linear(tiny[0], sets)
    logits = evaluate.logistic_regression(x[:300], y[:300], 20, result["protocol"]["penalty"])(x[300:])
    assert result["scores"]["11point_mAP"] == pytest.approx(evaluate.map_11point(logits, y[300:]))
    assert abs(result["scores"]["11point_mAP"] - evaluate.map_11point(logits.softmax(1), y[300:])) > 1e-3


def test_a_probe_with_too_few_pictures_is_told(tmp_path, tiny):
    class_folders(tmp_path / "mine/test", ["a", "b"])
    class_folders(tmp_path / "mine/train", ["a", "b"], each=1)
    with pytest.raises(ValueError, match="2 training pictures are too few for a linear probe"):
        evaluate.linear(tiny[0], evaluate.probe_sets("mine", tmp_path))
    class_folders(tmp_path / "memes/test", ["meme", "hatespeech meme"])
    class_folders(tmp_path / "memes/train", ["meme", "hatespeech meme"], each=2)
    with pytest.raises(ValueError, match="cannot be told from the 1 training pictures that are held out"):
        evaluate.linear(tiny[0], evaluate.probe_sets("memes", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("words,why", [
    (["--zeroshot", "own", "mine"], "no test set 'own'"),  # told on both, and mine is evaluated
    (["--zeroshot", "mine", "--linear", "own", "--protocol", "mocov3", "--epochs", "1", "--batch-size", "8"],
     "cannot read the picture"),  # the others wait for it in mid-epoch: the job ends
    (["--zeroshot", "mine", "--checkpoint", "runs/bad.pt", "runs/one/last.pt"], "bad.pt is not a checkpoint")])
def test_a_rank_that_fails_alone(words, why, coloured, tiny, tmp_path):
    """Rank 1 has no set `own`, or one with a picture that cannot be read: no score of one set is another's."""
    save(*tiny, tmp_path / "runs/one/last.pt")
    (tmp_path / "runs/bad.pt").touch()
    for rank in (0, 1):
        shutil.copytree(coloured / "mine", tmp_path / str(rank) / "mine")
        if rank == 0 or "--linear" in words:
            shutil.copytree(coloured / "mine", tmp_path / str(rank) / "own")
    if "--linear" in words:
        for file in (tmp_path / "1/own/train/a").iterdir():
            file.write_bytes(b"")
    (tmp_path / "go.py").write_text(f"import os, sys; sys.path.insert(0, {str(HERE)!r})\nos.environ['MASKCLIP_DATA'] = "
                                    "os.environ['RANK']\nimport evaluate\nevaluate.main()\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                           tmp_path / "go.py", *words], capture_output=True, text=True, cwd=tmp_path, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and why in done.stderr
    alone = evaluate.zeroshot(*tiny, data.test_set("mine", coloured))["scores"]
    records = json.loads((tmp_path / "runs/one/results.json").read_text())
    assert [(r["task"], r["scores"]) for r in records] == [("zeroshot mine", pytest.approx(alone))]


@pytest.mark.slow
def test_ranks_whose_pictures_lie_apart_share_what_is_kept(coloured, tiny, tmp_path):
    """Copies on two nodes have other paths and times: the first rank's stand for all, the second time too."""
    save(*tiny, tmp_path / "runs/one/last.pt")
    for rank in (0, 1):
        shutil.copytree(coloured / "mine", tmp_path / str(rank) / "mine", copy_function=shutil.copy)
    (tmp_path / "go.py").write_text(f"import os, sys; sys.path.insert(0, {str(HERE)!r})\nos.environ['MASKCLIP_DATA'] = "
                                    "os.environ['RANK']\nimport evaluate\nevaluate.main()\n")
    said = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                               tmp_path / "go.py", "--linear", "mine"], capture_output=True, text=True, cwd=tmp_path,
                              timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        said.append((done.stdout, {path.name: path.stat().st_mtime_ns for path in
                                   (tmp_path / "runs/one").glob("last.pt.features-*")}))
    assert said[0] == said[1] and len(said[0][1]) == 2  # the second time nothing is written


@pytest.mark.slow
def test_two_ranks_score_as_one(coloured, tiny, tmp_path):
    """Zero-shot, both linear probes under torchrun: the same numbers, said and written once."""
    said, written = [], []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        save(*tiny, folder / "runs/one/last.pt")
        iris(folder / "data/eurosat", spoken("eurosat_clip"))
        (folder / "data/mine").symlink_to(coloured / "mine")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        for words in (["--zeroshot", "eurosat_clip", "--linear", "mine"],
                      ["--linear", "mine", "--protocol", "mocov3", "--epochs", "2", "--batch-size", "32"]):
            done = subprocess.run([*launch, HERE / "evaluate.py", *words], capture_output=True, text=True, cwd=folder,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
            assert done.returncode == 0, done.stderr
            said.append((ranks, done.stdout))
        written.append([(r["task"], r["scores"]) for r in json.loads((folder / "runs/one/results.json").read_text())])
    assert written[0] == written[1] and len(written[0]) == 3
    assert [text for ranks, text in said if ranks == 1] == [text for ranks, text in said if ranks == 2]


@pytest.mark.gpu
def test_cuda_scores_as_the_cpu(coloured, tiny):
    """Classifier, features and both probes in float32 on CUDA."""
    sets, model = evaluate.probe_sets("mine", coloured), tiny[0]
    got = []
    for device in ("cpu", "cuda"):
        model.to(device)
        classifier = evaluate.zeroshot_classifier(model, tiny[1], ["dog", "F-16A/B"], ["a {}.", "art of the {}"])
        features = evaluate.encode_unit(model, sets[1].pictures)
        probes = [evaluate.linear(model, sets)["scores"]["top-1"],
                  evaluate.linear_mocov3(model, sets, epochs=4, batch_size=32, lr=0.05)["scores"]["top-1"]]
        got.append((classifier, features, probes))
    model.to("cpu")
    (classifier, features, probes), others = got
    assert torch.allclose(classifier, others[0], atol=1e-4) and torch.allclose(features, others[1], atol=1e-4)
    assert probes == pytest.approx(others[2], abs=0.03)  # one picture of 40
