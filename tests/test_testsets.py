"""Evaluation sets: prompts.json, one set in every layout, what is wrong in one; and the metrics."""
import json
import os
import re
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import picture_bytes
from PIL import Image

from support import pictures, testsets
from support.testsets import karpathy, load_picture, probe_sets, segmentation_set, test_set
from tools import readers

test_set.__test__ = False  # a function of ours, not a test

# ELEVATER's table: classes, templates, train, test, metric
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
SETS = testsets.protocols()
COCO = {"hateful-memes": "test_meta.json", "kitti-distance": "test_meta.json",
        "resisc45_clip": "test.json"}  # ELEVATER's jsons


def first(names):
    return names if isinstance(names, str) else names[0]


def spoken(name):
    return [first(names) for names in SETS[name]["classes"]]


def test_prompts_are_the_protocols():
    rows = [f"{name} {len(f['classes'])} {len(f['templates'])} {f['train']} {f['test']} "
            f"{f['metric']}" for name, f in SETS.items()]
    assert rows == TABLE.splitlines()
    for name, f in SETS.items():
        assert all("{}" in template for template in f["templates"]), name
        assert len(f.get("labels", f["classes"])) == len(f["classes"])
        # CLIP calls two classes of ImageNet "missile" and two "sunglasses"
        assert len(f["classes"]) - len(set(spoken(name))) == (2 if name == "imagenet" else 0)
        assert all(testsets.known_name(folder) == name for folder in f["folders"])
    paper = testsets.prompts()["paper"]["maskclip"]
    icinw = [paper[f"zeroshot {name}"][f["metric"]] for name, f in SETS.items()
             if name != "imagenet"]
    assert round(sum(icinw) / 20, 1) == paper["zeroshot icinw"]["mean of 20"] == 40.1


@pytest.mark.peers
def test_imagenet_s_prompts_are_open_clips_and_its_ids_timms():
    open_clip = pytest.importorskip("open_clip")
    timm = pytest.importorskip("timm")
    facts = SETS["imagenet"]
    assert facts["classes"] == list(open_clip.IMAGENET_CLASSNAMES)
    assert facts["templates"] == [make("{}") for make in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert facts["templates7"] == [make("{}") for make in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    ids = Path(timm.__file__).parent / "data/_info/imagenet_synsets.txt"
    assert facts["labels"] == ids.read_text().split()


# ---------------------------------------------------------------- one set in every layout

@lru_cache(None)
def picture_of(k, kind="PNG"):
    """A picture whose pixels tell its class."""
    return picture_bytes((k % 256, k // 256, 128), (4, 4), kind)


def shown(tests):
    """The class that the pixels of each picture tell."""
    pixels = [np.asarray(load_picture(picture))[0, 0].astype(int) for picture in tests.pictures]
    return [red + 256 * green for red, green, _ in pixels]


def class_folders(home, folders, each=1, kind="PNG"):
    for k, folder in enumerate(folders):
        (home / folder).mkdir(parents=True)
        for i in range(each):
            (home / folder / f"{k}_{i}.{kind.lower()}").write_bytes(picture_of(k, kind))


def elevater(home, labels, names, index="test.txt"):
    """ELEVATER's layout: labels, a class or a list of them for each picture, and their names."""
    home.mkdir(parents=True, exist_ok=True)
    members = {f"a set/{n}.png": [k] if isinstance(k, int) else k for n, k in enumerate(labels)}
    with zipfile.ZipFile(home / "pictures.zip", "w") as file:
        for path, classes in members.items():
            file.writestr(path, picture_of(classes[0]))
    if index.endswith(".txt"):
        lines = [f"pictures.zip@{path} {','.join(map(str, classes))}\n"
                 for path, classes in members.items()]
        (home / index).write_text("".join(lines))
        (home / "labels.txt").write_text("\n".join(names))
    else:  # categories in any order, their ids from 1
        images = [dict(id=path, file_name=path, zip_file="pictures.zip") for path in members]
        annotations = [dict(image_id=path, category_id=k + 1)
                       for path, classes in members.items() for k in classes]
        categories = [dict(id=k + 1, name=name) for k, name in enumerate(names)][::-1]
        (home / index).write_text(json.dumps(dict(images=images, annotations=annotations,
                                                  categories=categories)))


@pytest.mark.slow
def test_each_set_is_the_same_in_both_layouts(tmp_path):
    for name, facts in SETS.items():
        names = spoken(name)
        folders = [first(label).replace(" ", "_").replace("/", "-")
                   for label in facts.get("labels", facts["classes"])]
        if name == "kitti-distance":  # its names are sentences
            folders = ["0", "1", "2", "3"]
        class_folders(tmp_path / "a" / facts["folders"][0] / "test", folders)
        labels = np.random.default_rng(0).permutation(len(names)).tolist()
        elevater(tmp_path / "b" / facts["folders"][-1], labels, names, COCO.get(name, "test.txt"))
        several = name == "voc-2007-classification"  # a picture: not in class folders
        for part in dict(imagenet="a").get(name, "b" if several else "ab"):
            tests = test_set(facts["folders"][0], tmp_path / part)
            targets = tests.targets.argmax(1) if several else tests.targets
            assert targets.tolist() == shown(tests)
            assert sorted(shown(tests)) == list(range(len(names)))
            assert (tests.name, tests.metric, tests.squash) == (
                name, facts["metric"], name == "kitti-distance")
            assert tests.templates == facts["templates"]
            assert [one[0] for one in tests.names] == names
            assert f"the protocol has {facts['test']:,}" in tests.notes[-1]
            assert len(tests.notes) == 1 + (name == "kitti-distance" and part == "a")


def test_several_labels_a_picture(tmp_path):
    """VOC: a comma in ELEVATER's index; the original set has a list called test.txt."""
    classes_of = [sorted({n % 20, n * 7 % 20}) for n in range(60)]
    elevater(tmp_path / "voc2007", classes_of, spoken("voc-2007-classification"), "test_ic.txt")
    (tmp_path / "voc2007/test.txt").write_text("000001\n000002\n")
    targets = test_set("voc2007", tmp_path).targets
    assert [row.nonzero().flatten().tolist() for row in targets] == classes_of


def test_classes_that_are_called_by_numbers(tmp_path):
    """GTSRB's 00000 .. 00042 in ppm; flowers' 1 .. 102, of which a missing one moves no other."""
    class_folders(tmp_path / "gtsrb/test", [f"{k:05}" for k in range(43)], kind="PPM")
    class_folders(tmp_path / "flowers/test", [str(k) for k in range(1, 103)])
    for name in ("gtsrb", "flowers"):
        tests = test_set(name, tmp_path)
        assert tests.targets.tolist() == shown(tests) and "order" in tests.notes[0]
    (tmp_path / "flowers/test/1").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="pink primrose"):
        test_set("flowers", tmp_path)


def test_caltech_s_faces(tmp_path):
    """Folders by CLIP's meaning of their names; in an index either order, as ELEVATER's differs."""
    folders = [first(label) for label in SETS["caltech-101"]["labels"]]
    class_folders(tmp_path / "a/caltech101/test", folders)
    tests = test_set("caltech101", tmp_path / "a")
    names = {path.parent.name: tests.names[k][0]
             for path, k in zip(tests.pictures, tests.targets.tolist())}
    assert (names["Faces"], names["Faces_easy"]) == ("off-center face", "centered face")
    folders[37:39] = folders[38:36:-1]
    elevater(tmp_path / "b/caltech101", range(102), folders)
    assert test_set("caltech101", tmp_path / "b").targets.tolist() == list(range(102))


def test_splits(tmp_path):
    """The test split comes before the validation split; both sets of a probe have one order."""
    for split, each in (("train", 1), ("val", 2), ("test", 3)):
        class_folders(tmp_path / "dtd" / split, spoken("dtd"), each)
    train, tests = probe_sets("dtd", tmp_path)
    assert (len(train.pictures), len(tests.pictures)) == (47, 3 * 47)
    class_folders(tmp_path / "mine/train", "ab")
    class_folders(tmp_path / "mine/val", "ac")
    with pytest.raises(ValueError, match="different"):
        probe_sets("mine", tmp_path)


def test_names_and_templates_of_class_folders(tmp_path):
    home = tmp_path / "mine/test"
    class_folders(home, ["n01", "n_2"])
    tests = test_set("mine", tmp_path)
    assert tests.names == [["n01"], ["n 2"]] and tests.templates[0] == "{}"
    (home / "words.txt").write_text("n_2\ta dog, hound\n\nn01\tcat\nn03\tno folder\n")
    (home / "templates.txt").write_text("one {}\n\n")
    tests = test_set(str(tmp_path / "mine"), "nowhere")
    assert tests.names == [["cat"], ["a dog", "hound"]] and tests.templates == ["one {}"]
    words = tmp_path / "names.txt"
    words.write_text("n_2\tbird\nn01\tfish\n")
    assert test_set("mine", tmp_path, names=words).names == [["fish"], ["bird"]]
    for wrong in ("fish\nbird\n", "n01\tfish\n"):
        words.write_text(wrong)
        with pytest.raises(ValueError, match="FOLDER<tab>NAME"):
            test_set("mine", tmp_path, names=words)
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        test_set("mine", tmp_path, names="nowhere.txt")
    class_folders(tmp_path / "mnist/test", map(str, range(10)))
    with pytest.raises(ValueError, match="--names"):
        test_set("mnist", tmp_path, names=words)


def test_hidden_and_other_files_are_no_classes_and_no_pictures(tmp_path):
    home = tmp_path / "mine"
    class_folders(home, ["cat", "dog"], 2)
    class_folders(home / "dog", ["deeper"], 2)
    for name in (".ipynb_checkpoints/1.jpg", "__MACOSX/1.jpg", "cat/.hidden.jpg", "cat/.DS_Store",
                 "cat/.ipynb_checkpoints/2.jpg"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_bytes(picture_bytes())
    tests = test_set("mine", tmp_path)
    assert tests.targets.tolist() == [0, 0, 1, 1, 1, 1] and not tests.notes
    for name in ("cat/a.tif", "dog/a.txt", "loose.jpg"):
        (home / name).write_bytes(b"")
    for name in ("cat/a.bmp", "cat/a.gif", "dog/a.JFIF"):
        (home / name).write_bytes(picture_bytes())
    tests = test_set("mine", tmp_path)
    assert tests.targets.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert len(tests.notes) == 1 and "3 files in" in tests.notes[0]


def test_splits_are_no_classes_and_links_that_lead_back_are_left(tmp_path):
    class_folders(tmp_path / "a/train", ["cat", "dog"])
    (tmp_path / "a/test").mkdir()
    (tmp_path / "a/test/1.png").write_bytes(picture_bytes())
    with pytest.raises(ValueError, match="test, train, which are splits"):
        test_set(tmp_path / "a")
    class_folders(tmp_path / "b", ["cat", "dog"])
    (tmp_path / "b/cat/again").symlink_to(tmp_path / "b/cat")
    (tmp_path / "b/cat/up").symlink_to(tmp_path / "b")
    assert len(testsets.picture_files(tmp_path / "b/cat")[0]) == 2  # b/cat, and b/dog by up


def test_what_looks_like_a_path_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "mine", ["here"])
    class_folders(tmp_path / "data/mine", ["there"])
    assert test_set("mine", "data").names == [["there"]]
    assert test_set("./mine", "data").names == [["here"]]


def test_names_that_cannot_be_told_apart_or_are_not_given(tmp_path):
    class_folders(tmp_path / "mine", ["0", "1"])
    (tmp_path / "mine/words.txt").write_text("0\tcrane\n1\tcrane\n")
    assert "crane" in test_set("mine", tmp_path).notes[0]
    (tmp_path / "mine/words.txt").write_bytes(b"0\tcaf\xe9\n1\tcrane\n")
    with pytest.raises(ValueError, match="words.txt.*UTF-8"):
        test_set("mine", tmp_path)
    (tmp_path / "mine/words.txt").rename(tmp_path / "mine/classes.txt")
    with pytest.raises(ValueError, match="classes.txt.*words.txt"):
        test_set("mine", tmp_path)


@pytest.mark.parametrize("line", ["a photo of a {c}.", "{0}", "a {label}", "a photo", "{} {c}"])
def test_a_template_without_a_place_for_the_name_is_an_error(tmp_path, line):
    class_folders(tmp_path, ["cat"])
    (tmp_path / "templates.txt").write_text(f"a {{}}\n{line}\n")
    with pytest.raises(ValueError, match=f"templates.txt.*{re.escape(line)}"):
        test_set(tmp_path)
    with pytest.raises(ValueError, match="templates.txt"):
        readers.open_sources([tmp_path], "", classes=True)


# ---------------------------------------------------------------- what is wrong

EUROSAT = spoken("eurosat_clip")


@pytest.mark.parametrize("names,labels,word", [
    (EUROSAT[1::-1] + EUROSAT[2:], range(10), "order"), (EUROSAT[:9], range(9), "9 classes"),
    (EUROSAT, [*range(9), 10], r"\[10\]"), (EUROSAT, [[0, 3], *range(1, 10)], r"\[0, 3\]")])
def test_an_index_that_is_wrong(names, labels, word, tmp_path):
    elevater(tmp_path / "eurosat", labels, names)
    with pytest.raises(ValueError, match=word):
        test_set("eurosat_clip", tmp_path)


def test_an_index_that_cannot_be_checked_or_read(tmp_path):
    home = tmp_path / "eurosat"
    elevater(home, range(10), ["Acker", *EUROSAT[1:]])
    assert "Acker" in test_set("eurosat", tmp_path).notes[0]
    (home / "labels.txt").unlink()
    assert "labels.txt" in test_set("eurosat", tmp_path).notes[0]
    (home / "test.txt").unlink()
    for name, content in (("test.json", '{"images": 3, "categories": []}'), ("test.txt", "what")):
        (home / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name}.*ZIP@PATH"):
            test_set("eurosat", tmp_path)


def test_pictures_that_are_pipes_or_huge_are_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_BYTES", 5000)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "huge.png").write_bytes(bytes(5001))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("huge.png", bytes(5001))
    for picture, word in ((tmp_path / "pipe.png", "no file"), (tmp_path / "huge.png", "bytes"),
                          ((tmp_path / "a.zip", "huge.png"), "bytes")):
        with pytest.raises(ValueError, match=word):
            load_picture(picture)


def test_class_folders_that_are_wrong(tmp_path):
    """One of another name, which leaves one missing; one that is empty."""
    home = tmp_path / "eurosat/test"
    class_folders(home, [*SETS["eurosat_clip"]["labels"][:-1], "Moon"])
    with pytest.raises(ValueError, match="lake or sea.*Moon"):
        test_set("eurosat_clip", tmp_path)
    (home / "Moon/9_0.png").unlink()
    with pytest.raises(ValueError, match="no pictures.*Moon"):
        test_set("eurosat_clip", tmp_path)


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    elevater(tmp_path, range(3), "abc")
    archive = tmp_path / "pictures.zip"
    (tmp_path / "no.zip").write_bytes(archive.read_bytes()[:-50])
    (tmp_path / "no.png").write_text("no picture")
    assert load_picture((archive, "a set/0.png")).mode == "RGB"
    for picture in ((archive, "nothing.png"), (tmp_path / "no.zip", "a set/0.png"),
                    tmp_path / "no.png"):
        with pytest.raises(ValueError, match=testsets.picture_name(picture)):
            load_picture(picture)


# ---------------------------------------------------------------- retrieval, segmentation

@pytest.mark.parametrize("name,extra,folder", [
    ("coco", dict(filepath="val2014"), "val2014"), ("flickr30k", {}, "flickr30k-images")])
def test_karpathy_s_files_as_they_are_called(name, extra, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="karpathy.json"):
        karpathy(tmp_path)
    (tmp_path / folder).mkdir()
    images = [dict(filename="7.jpg", split="test", **extra,
                   sentences=[dict(raw="a dog"), dict(raw="it runs")]),
              dict(filename="8.jpg", split="val", sentences=[dict(raw="a cat")], **extra)]
    file = tmp_path / f"dataset_{name}.json"
    file.write_text(json.dumps(dict(images=images)))
    assert karpathy(tmp_path) == ([tmp_path / folder / "7.jpg"], ["a dog", "it runs"], [0, 0])
    assert karpathy(tmp_path, "val") == ([tmp_path / folder / "8.jpg"], ["a cat"], [0])
    with pytest.raises(ValueError, match="restval.*test.*val"):
        karpathy(tmp_path, "restval")
    for content in ('{"images": [{"filename": "x.jpg"}]}', "[1]", "{"):
        file.write_text(content)
        with pytest.raises(ValueError, match=file.name):
            karpathy(tmp_path)
    for sentences in ([], [dict(raw=" ")]):
        file.write_text(json.dumps(dict(images=[images[0], images[0] | dict(sentences=sentences)])))
        with pytest.raises(ValueError, match="no sentence"):
            karpathy(tmp_path)
    (tmp_path / "dataset_other.json").touch()
    with pytest.raises(ValueError, match="dataset_other.json.*karpathy.json"):
        karpathy(tmp_path)


def labelled(home, images, labels, count=2, value=1):
    for folder in (images, labels):
        (home / folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (home / images / f"{i}.jpg").write_bytes(picture_bytes("red", (8, 6), "JPEG"))
        Image.new("L", (8, 6), value).save(home / labels / f"{i}.png")


def test_layouts_of_labelled_pictures(tmp_path):
    home = tmp_path / "root/ADEChallengeData2016"
    labelled(home, "images/training", "annotations/training", 3)
    labelled(home, "images/validation", "annotations/validation")
    (home / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n"
                                            "1\t.1\t1\t1\t1\twall, x\n")
    train = segmentation_set("ade20k", tmp_path / "root", "train")
    tests = segmentation_set("ade20k", tmp_path / "root", "test")
    assert (len(train.pictures), len(tests.pictures), tests.names) == (3, 2, ["wall"])
    for value, label in ((1, 0), (0, 255), (255, 255)):
        labelled(home, "images/validation", "annotations/validation", value=value)
        assert np.unique(tests.load(0)[1]).tolist() == [label]
    labelled(tmp_path / "plain/dense", "images", "labels", 11)
    (tmp_path / "plain/dense/classes.txt").write_text("a\nb\n")
    sets = [segmentation_set("plain", tmp_path, split) for split in ("", "train", "test")]
    assert [len(one.pictures) for one in sets] == [11, 8, 3] and "splits" in sets[2].notes[0]
    with pytest.raises(FileNotFoundError, match="sceneparsing"):
        segmentation_set("ade20k", tmp_path)


def test_labelled_pictures_that_are_wrong(tmp_path):
    labelled(tmp_path, "val/images", "val/labels", 1, value=2)
    with pytest.raises(FileNotFoundError, match="classes.txt"):
        segmentation_set(tmp_path)
    (tmp_path / "classes.txt").write_text("a\n")
    tests = segmentation_set(tmp_path, split="test")
    file = tmp_path / "val/labels/0.png"
    for label, word in ((Image.new("L", (8, 6), 2), "up to 2:"), (Image.new("RGB", (8, 6)), "RGB"),
                        (Image.new("L", (9, 6)), "9, 6")):
        label.save(file)
        with pytest.raises(ValueError, match=word):
            tests.load(0)
    file.write_bytes(b"broken")
    with pytest.raises(ValueError, match="0.png"):
        tests.load(0)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 1"):
        segmentation_set(tmp_path)


# ---------------------------------------------------------------- metrics

def test_accuracy_and_mean_per_class_by_hand():
    scores = F.one_hot(torch.tensor([0, 0, 1, 1, 1, 0]), 3)
    assert testsets.accuracy(scores, torch.tensor([0, 0, 0, 1, 1, 1])) == pytest.approx(4 / 6)
    skewed = [0, 0, 0, 0, 1, 1]  # class 2 does not occur
    assert testsets.mean_per_class(scores.numpy(), skewed) == pytest.approx((2 / 4 + 1 / 2) / 2)


def test_roc_auc_by_hand():
    """Of six pairs four are in order, one is not, one is a tie."""
    scores, targets = torch.tensor([0.1, 0.3, 0.3, 0.5, 0.7]), torch.tensor([0, 0, 1, 0, 1])
    for given in (scores, torch.stack([-scores, scores], 1)):
        assert testsets.roc_auc(given, targets) == pytest.approx(4.5 / 6)
    scores, targets = torch.rand(8500), torch.arange(8500) % 3 == 0  # ranks beyond float32
    lead = scores[targets, None] - scores[~targets]
    right = ((lead > 0).double() + (lead == 0).double() / 2).mean().item()
    assert testsets.roc_auc(scores, targets) == pytest.approx(right, abs=1e-12)


def test_map_11point_equals_a_loop_over_thresholds():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(0, 6, (30, 4)) / 6)  # with ties
    targets = torch.from_numpy(rng.integers(0, 2, (30, 4)))
    total = 0.0
    for c in range(4):
        for level in range(11):
            best = 1.0 if level == 0 else 0.0
            for threshold in scores[:, c].unique():
                chosen = scores[:, c] >= threshold
                hits = targets[chosen, c].sum().item()
                if 10 * hits >= level * targets[:, c].sum().item():
                    best = max(best, hits / chosen.sum().item())
            total += best / 11 / 4
    assert testsets.map_11point(scores, targets) == pytest.approx(total)
    with pytest.raises(ValueError, match="positive"):
        testsets.map_11point(scores, targets * torch.tensor([1, 1, 0, 1]))
