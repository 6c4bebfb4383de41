"""Evaluation sets in the layouts in which they are published, and the metrics of their protocols.

prompts.json holds ICinW's twenty sets and ImageNet: classes in order, templates, metrics and sizes
(CLIP, ELEVATER); and the paper's numbers.  Layouts: ELEVATER's index and zips, class folders,
Karpathy's json, ADE20K's folders.  Metrics: ELEVATER's.

    tests = test_set("eurosat_clip", root="data")    # .pictures, .targets, .names, .templates
    train, tests = probe_sets("imagenet", root="data")
"""
import json
import os
import re
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import BAD_IMAGE, TEMPLATES, decode, open_picture, upright_size
from support.demo import draw_demo
from support.pictures import read_file, read_member
from support.shards import IMAGE_SUFFIXES, is_hidden, paths_of

ROOT_HINT = "(--root or $MASKCLIP_DATA name another folder)"


# ---------------------------------------------------------------- metrics: -> float in [0, 1]

def accuracy(scores, targets):
    """Share of rows whose highest score is the target's.  scores (n, C), targets (n,)"""
    hit = torch.as_tensor(scores).argmax(1) == torch.as_tensor(targets)
    return hit.double().mean().item()


def mean_per_class(scores, targets):
    """Recall averaged over the classes that occur.  scores (n, C), targets (n,)"""
    targets = torch.as_tensor(targets)
    hit = (torch.as_tensor(scores).argmax(1) == targets).double()
    return torch.stack([hit[targets == c].mean() for c in targets.unique()]).mean().item()


def map_11point(scores, targets):
    """VOC 2007's mean average precision as ELEVATER computes it.  scores, targets of 0 and 1 (n, C)

    For recall 1.0, 0.9 .. 0: the best precision at that recall or above; the mean over the 11, then
    over classes.  Equal scores are one threshold.  At recall 0 the precision is 1 by definition
    (scikit-learn's last point of the curve).  Raises ValueError if a class has no positive example.
    """
    scores = torch.as_tensor(scores).double()
    targets = torch.as_tensor(targets).double()
    if not targets.any(0).all():
        raise ValueError("11-point mAP needs a positive example of every class")
    means = []
    for score, target in zip(scores.T, targets.T):
        score, order = score.sort(descending=True)
        hits = target[order].cumsum(0)
        # A threshold lies after the last of equal scores.
        last_of_equals = torch.cat([score[1:] != score[:-1], torch.tensor([True])])
        precision = (hits / torch.arange(1, len(score) + 1))[last_of_equals]
        recall = (hits / target.sum())[last_of_equals]
        # 1e-9 because recall is compared with tenths, which are no binary fractions.
        best = [precision[recall >= level / 10 - 1e-9].max().item() for level in range(1, 11)]
        means.append((sum(best) + 1.0) / 11)
    return sum(means) / len(means)


def roc_auc(scores, targets):
    """Area under the ROC curve: share of (positive, negative) pairs in order, ties count half.

    scores (n,) or (n, 2), of which column 1 is used; targets (n,) of 0 and 1.
    """
    scores = torch.as_tensor(scores).double()
    positive = torch.as_tensor(targets) == 1
    if scores.ndim == 2:
        scores = scores[:, 1]
    _, inverse, count = scores.unique(return_inverse=True, return_counts=True)
    # From 1; equal scores share their mean.  In double: float32 is off by 6e-8 at 8,500 scores.
    ranks = (count.cumsum(0) - (count.double() - 1) / 2)[inverse]
    n = positive.sum().double()
    ordered = ranks[positive].sum() - n * (n + 1) / 2
    return (ordered / (n * (len(scores) - n))).item()


METRICS = {"accuracy": accuracy, "mean-per-class": mean_per_class, "11point_mAP": map_11point,
           "roc_auc": roc_auc}


# ---------------------------------------------------------------- prompts.json

@lru_cache
def prompts():
    """prompts.json: "sets", {name: metric, sizes, folders, templates, classes, labels}; "paper"."""
    return json.loads(Path(__file__).with_name("prompts.json").read_text("utf-8"))


def protocols():
    """The sets of prompts.json: ICinW's twenty and ImageNet."""
    return prompts()["sets"]


def known_name(name):
    """The key of prompts.json for `name`, which may be one of its folders; else `name`."""
    for key, facts in protocols().items():
        if _spelling(name) in map(_spelling, facts["folders"]):
            return key
    return name


def homes(name, root):
    """The paths at which the set `name` is looked for: its folders under root, and the path."""
    folders = protocols().get(known_name(name), {}).get("folders", [])
    return list(dict.fromkeys([*(Path(root, folder) for folder in folders),
                               *paths_of(name, root)]))


def _spelling(text):
    """A name without case, spaces and hyphens, by which names are compared."""
    return "".join(c for c in str(text).lower() if c.isalnum())


# ---------------------------------------------------------------- classification

@dataclass
class TestSet:
    """Labelled pictures to evaluate on, or to train a linear probe on."""
    name: str               # a key of prompts.json, or as given
    path: Path              # the index or the folder
    pictures: list          # of each the path, or (zip, name in the zip)
    targets: torch.Tensor   # (n,) class numbers, or (n, C) of 0 and 1 if a picture may show several
    names: list             # of each class a list of names, the first of which is the default
    templates: list         # sentences with {} in the position of the name
    metric: str = ""        # a key of METRICS, for the sets of prompts.json
    squash: bool = False    # resize to a square instead of cropping (KITTI in ELEVATER)
    notes: tuple = ()       # sentences that belong next to the score


def test_set(name, root="data", split="test", names=None):
    """The classification set `name` (of prompts.json, or a folder under root), or a path -> TestSet

    names: a file of lines FOLDER<tab>NAME for class folders, else their words.txt.  Raises
    FileNotFoundError that says what was looked for, and ValueError if classes are missing, unknown,
    or in another order than the protocol's, because no score is better than a wrong one.
    """
    if name == "demo":
        draw_demo(Path(root) / "demo")
    name = known_name(name)
    facts = protocols().get(name, {})
    path, pictures, labels, own_names, notes = _read_layout(name, root, split, facts)
    folder = path if path.is_dir() else path.parent
    if not facts:
        class_names = read_names(folder, own_names, names)
        numbers = range(len(class_names))
        firsts = [one[0] for one in class_names]
        alike = sorted({first for first in firsts if firsts.count(first) > 1})
        if alike:
            notes.append(f"classes of one name cannot be told apart: {', '.join(alike[:5])}")
    elif names:
        raise ValueError(f"--names is for class folders of your own: {name} has its protocol's")
    else:
        class_names = _lists(facts["classes"])
        numbers = _protocol_numbers(path, own_names, facts, notes)
        if len(pictures) != facts[split]:
            notes.append(f"{len(pictures):,} {split} pictures, the protocol has {facts[split]:,}")
    several = facts.get("metric") == "11point_mAP"
    for picture, classes in zip(pictures, labels):
        if max(classes) >= len(numbers) or len(classes) > 1 and not several:
            raise ValueError(f"{path}: {picture_name(picture)} has the labels {classes}, of "
                             f"{len(numbers)} classes counted from 0")
    targets = torch.tensor([numbers[classes[0]] for classes in labels])
    if several:
        targets = torch.zeros(len(labels), len(numbers), dtype=torch.long)
        for row, classes in zip(targets, labels):
            row[[numbers[k] for k in classes]] = 1
    return TestSet(str(name), path, pictures, targets, class_names,
                   facts.get("templates") or templates_of(folder), facts.get("metric", ""),
                   facts.get("squash", False), tuple(notes))


def probe_sets(name, root=""):
    """The training and the test set of a linear probe.  ValueError if their classes differ."""
    train = test_set(name, root, "train")
    tests = test_set(name, root, "test")
    if train.names != tests.names:
        raise ValueError(f"{train.path} and {tests.path} hold different classes")
    return train, tests


def templates_of(folder):
    """The lines of the folder's templates.txt, or data.TEMPLATES.  ValueError: one lacks its {}."""
    file = Path(folder) / "templates.txt"
    templates = _lines(file) or TEMPLATES
    for line in templates:
        if re.findall(r"\{.*?\}", line) != ["{}"]:
            raise ValueError(f"{file}: each line must have one {{}}, in the position of the class "
                             f"name, and no other braces: '{line}'")
    return templates


def _lines(file):
    """The lines of a text file that are not blank; none without the file."""
    try:
        lines = file.read_text("utf-8-sig").splitlines() if file.is_file() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text in UTF-8 ({error}): convert it") from error
    return [line.strip() for line in lines if line.strip()]


def read_names(home, folders, file=None):
    """[[name, synonym, ..]] of class folders, by a file of lines FOLDER<tab>NAME, SYNONYM, ..

    The file is home/words.txt if none is given.  Without it folders are named as they are called.
    """
    if not file and not (home / "words.txt").is_file():
        if (home / "classes.txt").is_file() and all(map(str.isdecimal, folders)):
            raise ValueError(f"{home} has folders called by numbers, and a classes.txt that does "
                             "not say whose names it has: write words.txt, FOLDER<tab>NAME a line")
        return [[folder.replace("_", " ")] for folder in folders]
    file = Path(file or home / "words.txt")
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    words = {}
    for line in _lines(file):
        folder, _, names = line.partition("\t")
        words[folder] = [name.strip() for name in names.split(",") if name.strip()]
    missing = [folder for folder in folders if not words.get(folder)]
    if missing:
        raise ValueError(f"{file} must have a line FOLDER<tab>NAME for each class folder, and has "
                         f"none for {', '.join(missing[:5])}")
    return [words[folder] for folder in folders]


def _protocol_numbers(path, names, facts, notes):
    """The protocol's number of each class of the data set.  -> [int]

    An index numbers its classes, so their names must be in the protocol's order.  Class folders
    have names in any order, or are called by numbers from 0 or 1.
    """
    classes = _lists(facts["classes"])
    labels = _lists(facts.get("labels", classes))
    number_of = {_spelling(name): k for k, one in enumerate(classes) for name in one}
    number_of |= {_spelling(label[0]): k for k, label in enumerate(labels)}
    unknown = [name for name in names if _spelling(name) not in number_of]
    if path.is_file():
        numbers = list(range(len(names or classes)))
        for name, one, label in zip(names, classes, labels):
            if name not in unknown and _spelling(name) not in map(_spelling, one + label):
                raise ValueError(f"{path}: its classes are in another order than the protocol's, "
                                 f"the first of these is '{name}'")
    elif all(name.isdecimal() for name in names):
        first = min(1, min(map(int, names)))
        numbers = [int(name) - first for name in names]
    else:
        numbers = [number_of.get(_spelling(name), -1) for name in names]
    if sorted(numbers) != list(range(len(classes))):
        missing = [one[0] for k, one in enumerate(classes) if k not in numbers]
        raise ValueError(f"{path}: {len(names)} classes, and the protocol has {len(classes)}; "
                         f"missing: {', '.join(missing[:5])}; unknown: {', '.join(unknown[:5])}")
    if unknown or not names:
        notes.append("the order of the classes was not checked: prompts.json does not have "
                     f"{', '.join(unknown[:3]) or 'names: no labels.txt'}")
    return numbers


def _lists(names):
    """Of each class a list of names."""
    return [[one] if isinstance(one, str) else one for one in names]


# ---------------------------------------------------------------- layouts of classification sets
# -> index or folder, pictures, of each a list of the data set's own class numbers, its class names,
# notes

SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
CLASS_PARTS = {"test": ["classes/test", "test", "val", "validation", "."],
               "train": ["classes/train", "train"]}


def _read_layout(name, root, split, facts):
    """What the first folder that holds the set has of a split.  FileNotFoundError without one."""
    indices = [f"{split}{end}" for end in ("_ic.txt", "_images.txt", ".txt", "_meta.json", ".json")]
    # Class folders cannot say that a picture shows several classes.
    parts = [] if facts.get("metric") == "11point_mAP" else CLASS_PARTS[split]
    for home in homes(name, root):
        for index in (home / file for file in indices):
            if index.is_file():
                return _read_index(index)
        for folder in (home / part for part in parts):
            with suppress(FileNotFoundError):
                pictures, numbers, names, notes = class_folder(folder)
                return folder, pictures, [[k] for k in numbers], names, notes
    raise FileNotFoundError(
        f"no {split} set '{name}' in {', '.join(map(str, homes(name, root)))} {ROOT_HINT}: "
        f"ELEVATER's index and zips are read (for sets of several classes a picture only these), "
        f"and class folders such as {split}/CLASS/1.jpg, so sort pictures of other formats")


def _read_index(index):
    """ELEVATER's lines ZIP@PATH LABEL[,LABEL..] and labels.txt, or its json in COCO's form."""
    pictures = []
    labels = []
    try:
        if index.suffix == ".json":
            content = json.loads(index.read_bytes())
            categories = sorted(content["categories"], key=lambda category: category["id"])
            names = [category["name"] for category in categories]
            number_of = {category["id"]: k for k, category in enumerate(categories)}
            labels_of = {}
            for row in content["annotations"]:
                labels_of.setdefault(row["image_id"], []).append(number_of[row["category_id"]])
            for image in content["images"]:
                pictures.append((index.parent / image["zip_file"], image["file_name"]))
                labels.append(labels_of[image["id"]])
        else:
            for line in _lines(index):
                picture, numbers = line.rsplit(maxsplit=1)
                archive, path = picture.split("@", 1)
                pictures.append((index.parent / archive, path))
                labels.append([int(number) for number in numbers.split(",")])
            names = _lines(index.with_name("labels.txt")) or _lines(index.with_name("labelmap.txt"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is no index in ELEVATER's form, lines ZIP@PATH LABEL or a json "
                         f"like COCO's ({error!r})") from error
    return index, pictures, labels, names, []


def class_folder(folder):
    """A folder of pictures for each class.  -> paths, class number of each, sorted names, notes

    Raises FileNotFoundError if there are no pictures, ValueError if a class has none.
    """
    folder = Path(folder)
    names = sorted(entry.name for entry in folder.glob("*")
                   if entry.is_dir() and not is_hidden(entry.name))
    if names and SPLITS.issuperset(map(str.lower, names)):
        raise ValueError(f"{folder} holds {', '.join(names)}, which are splits and no classes, and "
                         "no folder of classes where one was looked for")
    others = [path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    files = []
    for name in names:
        pictures, more = picture_files(folder / name)
        files.append(pictures)
        others += more
    if not any(files):
        raise FileNotFoundError(f"no class folders with pictures in {folder.resolve()}")
    empty = [name for name, pictures in zip(names, files) if not pictures]
    if empty:
        raise ValueError(f"no pictures of {len(empty)} classes in {folder}: {', '.join(empty[:5])}")
    numbers = [number for number, pictures in enumerate(files) for _ in pictures]
    notes = []
    if others:
        notes.append(f"{len(others)} files in {folder} are left out: not in a class, or not named "
                     f"as a picture, {', '.join(IMAGE_SUFFIXES)} ({others[0].name})")
    return [path for pictures in files for path in pictures], numbers, names, notes


def picture_files(folder):
    """-> pictures of a folder and its subfolders, sorted; other files; hidden ones are neither"""
    pictures, others, seen = [], [], set()
    for home, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(home))  # because a link may lead back
        folders[:] = [name for name in folders if not is_hidden(name)
                      and os.path.realpath(os.path.join(home, name)) not in seen]
        for name in names:
            if not is_hidden(name):
                path = Path(home, name)
                (pictures if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
    return sorted(pictures), others


def picture_name(picture):
    """What messages call a picture of a TestSet."""
    return "@".join(map(str, picture)) if isinstance(picture, tuple) else str(picture)


def load_picture(picture):
    """A picture of a TestSet -> RGB picture.  Raises ValueError that names it if it is bad."""
    try:
        if isinstance(picture, tuple):
            content = read_member(_open_zip(str(picture[0]), os.getpid()), picture[1])
        else:
            content = read_file(picture)
        return decode(content)
    except (*BAD_IMAGE, zipfile.BadZipFile, KeyError) as error:  # KeyError: not in the zip
        raise ValueError(f"cannot read the picture {picture_name(picture)}: {error}") from error


@lru_cache(64)
def _open_zip(path, process):
    """An open zip of this process: a forked one would share its position in the file."""
    return zipfile.ZipFile(path)


# ---------------------------------------------------------------- retrieval

def karpathy(folder, split="test"):
    """A split of a Karpathy json.  -> paths of pictures, sentences, picture number of each sentence

    The file is karpathy.json or dataset*.json: {"images": [{"filename", "split", "sentences":
    [{"raw"}]}]}; COCO's pictures are in its "filepath".  Raises FileNotFoundError without a file,
    ValueError for another format or a split without pairs.
    """
    folder = Path(folder)
    known = [folder / "karpathy.json", folder / f"dataset_{folder.name}.json"]
    files = [*filter(Path.is_file, known)] or sorted(folder.glob("dataset*.json"))
    if len(files) > 1 and files[0] not in known:
        raise ValueError(f"{folder} holds {', '.join(file.name for file in files)}: call the one "
                         "that is meant karpathy.json")
    if not files:
        raise FileNotFoundError(f"no karpathy.json or dataset*.json in {folder.resolve()}: it is "
                                "in Karpathy's format, with its pictures in images/")
    parts = [folder / part for part in ("images", "flickr30k-images") if (folder / part).is_dir()]
    home = (parts or [folder])[0]
    paths, texts, owners = [], [], []
    try:
        images = json.loads(files[0].read_bytes())["images"]
        for image in images:
            if image["split"] == split:
                sentences = [sentence["raw"] for sentence in image["sentences"]]
                if not sentences or not all(map(str.strip, sentences)):
                    raise ValueError(f"no sentence, or an empty one, of {image['filename']}")
                owners += [len(paths)] * len(sentences)
                texts += sentences
                paths.append(home / image.get("filepath", "") / image["filename"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{files[0]} is not a Karpathy json ({error!r})") from error
    if not texts:
        splits = sorted({image["split"] for image in images})
        raise ValueError(f"{files[0]} has no sentences of split '{split}', but of {splits}")
    return paths, texts, owners


# ---------------------------------------------------------------- segmentation

# Of pictures and of labels: ADE20K's folders, and plain ones; the last are divided here.
SEGMENTATION_FOLDERS = {
    "train": [("images/training", "annotations/training"), ("train/images", "train/labels"),
              ("images", "labels")],
    "test": [("images/validation", "annotations/validation"), ("val/images", "val/labels"),
             ("images", "labels")]}


@dataclass
class SegmentationSet:
    """Pictures whose every pixel has a label."""
    name: str
    path: Path
    pictures: list      # paths
    labels: list        # paths of PNGs of the same sizes: class k is k + 1, nothing is 0 (or 255)
    names: list         # of the classes
    notes: tuple = ()

    def load(self, i):
        """-> RGB picture, `label`.  Raises ValueError that names a file."""
        return load_picture(self.pictures[i]), self.label(i)

    def label(self, i):
        """-> picture (L) of classes 0 .. C - 1, 255 for none.  ValueError that names a file."""
        file = self.labels[i]
        try:
            size = upright_size(open_picture(self.pictures[i].read_bytes()))  # decodes no pixel
            label = Image.open(file, formats=("PNG",))
            values = np.array(label).astype(np.int32)
        except BAD_IMAGE as error:
            raise ValueError(f"cannot read {self.pictures[i]} or {file}: {error}") from error
        highest = values[values != 255].max(initial=0)
        if values.ndim != 2 or label.size != size or highest > min(len(self.names), 254):
            raise ValueError(f"{file} has size {label.size}, mode {label.mode} and labels up to "
                             f"{highest}: it must have the size {size} of its picture, and one of "
                             f"{len(self.names)} classes (at most 254) a pixel, 0 or 255 for none")
        # Nothing is -1 here, which is 255 as uint8.
        return Image.fromarray(np.where(values == 255, 255, values - 1).astype(np.uint8))


def segmentation_set(name, root="", split=""):
    """The set `name` under root, or at the path `name`, of a split: "train", "test", or "" for all.

    classes.txt (or ADE20K's objectInfo150.txt) names the classes.  Without folders of splits every
    fifth picture is the test split.  Raises FileNotFoundError.
    """
    if name == "demo":
        draw_demo(Path(root) / "demo")
    bases = [home / part for home in homes(name, root) for part in (".", "dense")]
    if name == "ade20k":
        bases.append(Path(root, "ADEChallengeData2016"))
    layouts = [(base, *parts) for base in bases for parts in SEGMENTATION_FOLDERS[split or "test"]
               if (base / parts[1]).is_dir()]
    if not layouts:
        raise FileNotFoundError(
            f"no segmentation set '{name}' in {', '.join(map(str, bases))} {ROOT_HINT}: images/ "
            "and labels/ (PNG) are read, alone or in train/ and val/, and ADE20K's folders as in "
            "ADEChallengeData2016.zip of sceneparsing.csail.mit.edu")
    path, images, labels = layouts[0]
    rows = _lines(path / "objectInfo150.txt")[1:]  # Idx, Ratio, Train, Val, Stuff, Name
    names = _lines(path / "classes.txt")
    names = names or [row.split("\t")[-1].split(",")[0].strip() for row in rows]
    if not names:
        raise FileNotFoundError(f"no classes.txt (or ADE20K's objectInfo150.txt) in {path}")
    pictures, others = picture_files(path / images)
    notes = ()
    if others:
        notes = (f"{len(others)} files in {path / images} are left out: not named as a picture, "
                 f"{', '.join(IMAGE_SUFFIXES)} ({others[0].name})",)
    if split and images == "images":
        pictures = [file for i, file in enumerate(pictures) if (i % 5 == 0) == (split == "test")]
        notes += (f"{path} has no splits: every fifth picture is a test picture",)
    files = [path / labels / picture.relative_to(path / images).with_suffix(".png")
             for picture in pictures]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise FileNotFoundError(f"{path / images}: {len(missing)} of {len(files)} label pictures "
                                f"are missing: {', '.join(missing[:3])}")
    return SegmentationSet(str(name), path, pictures, files, names, notes)
