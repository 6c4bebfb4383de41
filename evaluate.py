"""Evaluation of frozen weights, ours or a peer's: zero-shot, retrieval, linear probe, dense scores.

Paper: section 4.  Protocols: CLIP (ensembles of prompts, linear probe by L-BFGS), ELEVATER (ICinW),
CLIP_benchmark (recall), MaskCLIP of Zhou et al. 2022 (dense scores without training).  Each score
is printed next to the paper's, and kept in results.jsonl next to the checkpoint.

    python evaluate.py --zeroshot imagenet icinw --retrieval flickr30k coco --linear imagenet
    python evaluate.py --zeroshot FOLDER/OF/CLASS/FOLDERS --checkpoint runs/a/last.pt ViT-B-16.pt
"""
import argparse
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import model as models
from support import testsets
from support.probe import best_penalty, probe_scores
from support.results import (append_result, file_sha256, provenance,  # noqa: F401  train's too
                             read_results, table)
from support.runtime import init_distributed, run_program, sentence_of
# Others take the metrics from here.
from support.testsets import METRICS, accuracy, map_11point, mean_per_class, roc_auc  # noqa: F401
from support.weights import FORMATS, read_weights, weights_file
from tokenizer import Tokenizer

# Letters in shapes: n pictures, m texts, C classes, E joint embedding, D image tower, N patches.


# ---------------------------------------------------------------- the model

def newest_checkpoint(runs="runs"):
    """The last.pt under `runs` that was written last.  FileNotFoundError if there is none."""
    paths = sorted(Path(runs).glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise FileNotFoundError(f"no checkpoint under {Path(runs).resolve()}: train one "
                                "(python train.py) or name one with --checkpoint")
    return paths[-1]


def load_model(path):
    """Any weights of support.weights -> model in eval mode, tokenizer (None if it has no text)

    model.notes: sentences about what the file does not say; model.sha256: of the file.  Raises
    FileNotFoundError; ValueError if it is no checkpoint, is damaged, or is of another version.
    """
    weights = read_weights(path)
    has_text = "text_projection.weight" in weights["model"]
    tokenizer = None
    try:
        if "tokenizer" in weights:
            model = models.build(weights["config"])
        else:
            model = (models.CLIP if has_text else models.VisionModel)(weights["config"])
        model.load_state_dict(weights["model"])
        if has_text and "tokenizer" in weights:
            tokenizer = Tokenizer([tuple(line.split(" ")) for line in weights["tokenizer"]])
        elif has_text:
            tokenizer = Tokenizer.clip()
    except (LookupError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit model.py: {reason}") from error
    model.notes = weights["notes"]
    model.sha256 = weights["sha256"]
    return model.eval(), tokenizer


# ---------------------------------------------------------------- pictures and texts -> features

def evaluation_view(config, squash=False):
    """What a model sees of a picture (CLIP): resized, then the middle; squash: all, as a square."""
    resample = dict(bicubic=Image.BICUBIC, bilinear=Image.BILINEAR)[config.interpolation]
    size = config.image_size
    if squash:  # ELEVATER, for KITTI
        return partial(Image.Image.resize, size=(size, size), resample=resample)
    return partial(data.center_crop, size=size, resample=resample)


def load_batch(pictures, view):
    """Pictures -> uint8 pixels (B, H, W, 3).  ValueError names a damaged one: none is left out."""
    images = [np.array(view(testsets.load_picture(picture))) for picture in pictures]
    return torch.from_numpy(np.stack(images))


@torch.no_grad()
def encode_images(encode, pictures, model, view=None):
    """encode(pixels (B, 3, H, W) normalised) of pictures, in their order -> (n, ...) float32 on CPU

    view: what `encode` sees of a picture, else evaluation_view.
    """
    device = device_of(model)
    view = view or evaluation_view(model.config)
    # On a CPU, 32 pictures of 224 pixels stay below the 32 MiB from which on malloc maps new pages.
    batch_size = 256 if device.type == "cuda" else 32
    # One core is left to a model on the CPU.  A small set is done before a process has started.
    workers = max(0, min(8, data.cpu_count() - 1, len(pictures) // 1000))
    loader = torch.utils.data.DataLoader(pictures, batch_size, num_workers=workers,
                                         collate_fn=partial(load_batch, view=view),
                                         worker_init_fn=data.ignore_signals)
    features = [encode(data.normalize(images.to(device))).float().cpu()
                for images in progress(loader, "pictures")]
    return check_finite(torch.cat(features))


@torch.no_grad()
def encode_texts(model, tokenizer, texts, batch_size=512):
    """Unit features of texts, in their order -> (m, E) on CPU."""
    tokens = [tokenizer(text, model.config.context_length)[0] for text in texts]
    # Texts of like length make a batch, so that little of it is padding.
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    features = torch.empty(len(texts), model.config.embed_dim)
    for start in progress(range(0, len(order), batch_size), "texts"):
        part = order[start:start + batch_size]
        rows = torch.nn.utils.rnn.pad_sequence([tokens[i] for i in part], batch_first=True)
        encoded = model.encode_text(rows.to(device_of(model)))
        features[part] = F.normalize(encoded.float(), dim=1).cpu()
    return check_finite(features)


def zeroshot_classifier(model, tokenizer, classnames, templates):
    """A row for each class: the mean of its prompts' unit features, made unit (CLIP) -> (C, E)

    templates: sentences with {} in the position of the class name.  A class may be a list of names,
    over all of which the mean is taken (SLIP).
    """
    names = [[one] if isinstance(one, str) else one for one in classnames]
    prompts = [template.replace("{}", name)
               for synonyms in names for name in synonyms for template in templates]
    sizes = [len(synonyms) * len(templates) for synonyms in names]
    features = encode_texts(model, tokenizer, prompts).split(sizes)
    return F.normalize(torch.stack([rows.mean(0) for rows in features]), dim=1)


def check_finite(features):
    """The features; ValueError if some are not finite, because they compare wrongly."""
    finite = features.flatten(1).isfinite().all(1)
    if not finite.all():
        raise ValueError(f"the model's features are not finite for {(~finite).sum()} of "
                         f"{len(features)} inputs: is this a run that diverged?")
    return features


def device_of(model):
    """Where a model computes."""
    return next(model.parameters()).device


def progress(items, label):
    """A bar, if the output is a terminal."""
    return tqdm(items, label, disable=None, leave=False)


# ---------------------------------------------------------------- metrics: shares in [0, 1]
# Those of classification are ELEVATER's, in support/testsets.py.

def recall_at_k(similarity, text_to_image, ks=(1, 5, 10)):
    """similarity (n, m), text_to_image (m,) -> {"i2t": {k: r}, "t2i": {k: r}}  (CLIP_benchmark)

    i2t: share of images with at least one of their texts among the k most similar; t2i: share of
    texts whose image is.
    """
    similarity = torch.as_tensor(similarity)
    right = torch.arange(len(similarity))[:, None] == torch.as_tensor(text_to_image)    # (n, m)
    return recall_of_counts(count_ahead(similarity, right), count_ahead(similarity.T, right.T), ks)


def recall_of_features(images, texts, text_to_image, ks=(1, 5, 10), block=2 ** 26):
    """recall_at_k of unit features (n, E), (m, E), with `block` similarities in memory at once."""
    text_to_image = torch.as_tensor(text_to_image)
    image_numbers = torch.arange(len(images))
    i2t = [count_ahead(images[rows] @ texts.T, rows[:, None] == text_to_image)
           for rows in image_numbers.split(max(1, block // len(texts)))]
    t2i = [count_ahead(texts[rows] @ images.T, text_to_image[rows, None] == image_numbers)
           for rows in torch.arange(len(texts)).split(max(1, block // len(images)))]
    return recall_of_counts(torch.cat(i2t), torch.cat(t2i), ks)


def recall_of_counts(i2t, t2i, ks):
    """count_ahead of each image (n,) and of each text (m,) -> recall_at_k's dict"""
    return {way: {k: (ahead < k).float().mean().item() for k in ks}
            for way, ahead in (("i2t", i2t), ("t2i", t2i))}


def count_ahead(similarity, right):
    """How many wrong columns are at least as similar as a row's best right one -> (rows,)

    similarity, right (bool): (rows, columns).  Of equals the right one comes last, so that a model
    which tells nothing apart recalls nothing.
    """
    best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((similarity >= best) & ~right).sum(1)


def confusion_matrix(guess, label, classes):
    """Pixels by label and guess -> (C, C).  Both are 0 .. C - 1; higher labels are left out."""
    labelled = label < classes
    pairs = label[labelled].long() * classes + guess[labelled].long()
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def mean_iou(confusion):
    """Intersection / union, mean over the classes that occur.  confusion (C, C) [label, guess]"""
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return (confusion.diag()[union > 0] / union[union > 0]).mean().item()


def segmentation_scores(confusion):
    """confusion (C, C) -> {"mIoU", "pixel accuracy"}"""
    return {"mIoU": mean_iou(confusion),
            "pixel accuracy": (confusion.trace() / confusion.sum()).item()}


# ---------------------------------------------------------------- evaluations
# Each returns a dict: "scores" {name: share in [0, 1]}, "chance" (of the first score), "over" (what
# was counted), "protocol" (what two scores must share to be compared), "notes" (sentences).

def zeroshot(model, tokenizer, tests, synonyms=False):
    """Zero-shot classification (CLIP).  In addition "per_class": {name: recall}.

    tests: a TestSet, or a folder of class folders.  If a class has several names the first is taken
    (ELEVATER); synonyms: all of them (SLIP).
    """
    if not isinstance(tests, testsets.TestSet):
        tests = testsets.test_set(tests, root="")
    if all(re.fullmatch(r"n\d{8}", names[0]) for names in tests.names):
        raise ValueError(f"{tests.path}: the classes are WordNet ids: give words.txt or --names, "
                         "or, for ImageNet's 1,000, its name (imagenet) and --root")
    names = tests.names if synonyms else [names[:1] for names in tests.names]
    classifier = zeroshot_classifier(model, tokenizer, names, tests.templates)      # (C, E)
    view = evaluation_view(model.config, tests.squash)
    features = F.normalize(encode_images(model.encode_image, tests.pictures, model, view), dim=1)
    # 100: CLIP's logit scale.  ROC-AUC and mAP rank pictures by this softmax (ELEVATER), which is
    # another order than that of the cosines.
    probabilities = (100 * features @ classifier.T).double().softmax(1)             # (n, C)
    metrics = {"top-1": accuracy, "mean per class": mean_per_class}
    if tests.metric:
        metrics = {tests.metric: METRICS[tests.metric]}
    per_class = {}
    if tests.targets.ndim == 1:
        for c, one in enumerate(names):
            per_class[one[0]] = accuracy(probabilities[tests.targets == c], torch.tensor(c))
    return dict(scores={name: metric(probabilities, tests.targets)
                        for name, metric in metrics.items()},
                per_class=per_class, chance=chance(tests), notes=tests.notes,
                over=f"{len(features):,} pictures of {len(names):,} classes",
                protocol=counts(tests) | dict(
                    templates=len(tests.templates), synonyms=synonyms, squash=tests.squash,
                    view=f"{model.config.interpolation}, {model.config.image_size}"))


def retrieval(model, tokenizer, folder, split="test"):
    """Image-text retrieval on a split of a Karpathy json, with all texts of each picture."""
    paths, texts, owners = testsets.karpathy(folder, split)
    images = F.normalize(encode_images(model.encode_image, paths, model), dim=1)    # (n, E)
    recall = recall_of_features(images, encode_texts(model, tokenizer, texts), owners)
    return dict(scores={f"{way} R@{k}": r for way in recall for k, r in recall[way].items()},
                chance=1 / len(paths), over=f"{len(paths):,} pictures, {len(texts):,} texts",
                protocol=dict(path=str(folder), pictures=len(paths), texts=len(texts), split=split))


def linear(model, sets):
    """Linear probe (CLIP): logistic regression on frozen class tokens.  sets: training, test set"""
    train, tests = sets
    classes = len(tests.names)
    metric = METRICS[tests.metric or "accuracy"]

    def encode(images):
        return model.visual(images)[:, 0]   # (B, D), before the projection to the joint space: CLIP
    view = evaluation_view(model.config, tests.squash)
    x = encode_images(encode, train.pictures, model, view).to(device_of(model))     # (n, D)
    x_test = encode_images(encode, tests.pictures, model, view)
    penalty = best_penalty(x, train.targets, classes, metric)
    scores = probe_scores(x, train.targets, x_test, classes, penalty)
    return dict(scores={tests.metric or "top-1": metric(scores, tests.targets)},
                chance=chance(tests), notes=train.notes + tests.notes,
                over=f"{len(x_test):,} pictures of {classes:,} classes, {len(x):,} to train",
                protocol=counts(tests) | dict(
                    recipe="clip", penalty=penalty, training_pictures=len(x),
                    view=f"{model.config.interpolation}, {model.config.image_size}"))


def dense(model, tokenizer, tests):
    """Segmentation by words: a pixel's class is the one whose words are nearest to its patch.

    tests: a SegmentationSet, or the folder of one.
    """
    if not isinstance(tests, testsets.SegmentationSet):
        tests = testsets.segmentation_set(tests)
    classes = len(tests.names)
    grid = model.config.grid
    size = model.config.image_size
    classifier = zeroshot_classifier(model, tokenizer, tests.names,
                                     testsets.templates_of(tests.path))             # (C, E)
    features = encode_images(model.encode_patches, tests.pictures, model)           # (n, N, E)
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    for i, patches in enumerate(F.normalize(features, dim=2)):
        maps = (patches @ classifier.T).T.reshape(1, -1, grid, grid)
        guess = F.interpolate(maps, (size, size), mode="bilinear")[0].argmax(0)     # (H, W)
        label = np.array(data.center_crop(tests.label(i), size, Image.NEAREST))
        confusion += confusion_matrix(guess, torch.from_numpy(label), classes)
    absent = [name for name, n in zip(tests.names, confusion.sum(1)) if not n]
    notes = list(tests.notes)
    if absent:
        notes.append(f"{len(absent)} of the classes are in no label picture (1 is the first class)"
                     f": {', '.join(absent[:3])}")
    return dict(scores=segmentation_scores(confusion), notes=notes,
                chance=1 / (2 * classes - 1),   # IoU of a guess at random: 1/C^2 / (2/C - 1/C^2)
                over=f"{len(features):,} pictures, {classes} classes",
                protocol=dict(path=str(tests.path), pictures=len(features), classes=classes))


# task: its part of the folder of test sets next to train/, function(model, tokenizer, that folder)
EVALUATIONS = {
    "zeroshot": ("classes/test", zeroshot),
    "retrieval": ("val", retrieval),
    "linear": ("classes", lambda model, _, folder: linear(model, testsets.probe_sets(folder))),
    "dense": ("dense", dense)}


def chance(tests):
    """What a model that knows nothing scores on a TestSet."""
    if tests.metric == "roc_auc":
        return 0.5
    if tests.targets.ndim > 1:  # average precision: the share of positive examples
        return tests.targets.float().mean().item()
    return 1 / len(tests.names)


def counts(tests):
    """What is counted of a TestSet: a part of "protocol"."""
    return dict(set=tests.name, path=str(tests.path.resolve()), pictures=len(tests.pictures),
                classes=len(tests.names))


def main_scores(results):
    """{task: result} -> {task: its first score}"""
    return {task: next(iter(result["scores"].values())) for task, result in results.items()}


ICINW = [name for name in testsets.protocols() if name != "imagenet"]  # ELEVATER's twenty


def icinw_mean(results, root):
    """{name: result} of ICinW's sets that are there -> their mean; its notes name the others."""
    n = len(results)
    missing = [f"missing: {name}: {', '.join(map(str, testsets.homes(name, root)))}"
               for name in ICINW if name not in results]
    title = "partial mean" if missing else f"mean of {n}"
    return dict(scores={title: sum(main_scores(results).values()) / n},
                chance=sum(result["chance"] for result in results.values()) / n,
                over=f"{n} of {len(ICINW)} data sets", notes=missing,
                protocol=dict(sets=list(results)))


# ---------------------------------------------------------------- the command line

def find(name, root, subfolder):
    """The folder of a data set: ROOT/NAME/SUBFOLDER, ROOT/NAME, or the path NAME."""
    if name == "demo":
        testsets.draw_demo(Path(root, "demo"))
    folders = [path / part for path in testsets.paths_of(name, root)
               for part in (subfolder, "")]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no test set '{name}': looked for the folders "
                            f"{', '.join(map(str, folders))} {testsets.ROOT_HINT}")


def evaluate_set(task, name, model, tokenizer, args):
    """One task on one data set -> a result.  Raises FileNotFoundError if the set is not there."""
    if task == "linear":
        return linear(model, testsets.probe_sets(name, args.root))
    if tokenizer is None:
        raise ValueError(f"--{task} needs a text encoder, and a model of method "
                         f"{model.config.method} has none: use --linear")
    if task == "dense":
        return dense(model, tokenizer, testsets.segmentation_set(name, args.root))
    if task == "retrieval":
        return retrieval(model, tokenizer, find(name, args.root, "val"), args.split)
    tests = testsets.test_set(name, args.root, names=args.names)
    if tests.name == "imagenet" and args.templates == 7:
        tests.templates = testsets.protocols()["imagenet"]["templates7"]  # SLIP
    return zeroshot(model, tokenizer, tests, args.synonyms)


def evaluate_checkpoint(path, device, args, failures):
    """What the command line asks for of one checkpoint -> method, {task: result}

    Adds to failures a sentence for each data set that fails; OSError, ValueError if loading does.
    """
    model, tokenizer = load_model(path)
    read_results(weights_file(path).parent)  # fails now, not after hours
    config = model.config
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{path}: {config.method}, {millions:.1f} M parameters, {config.image_size} pixels")
    for note in model.notes:
        print(f"  {note}")
    model.to(device)
    results = {}

    def keep(title, result):
        results[title] = result
        append_result(path, model, title, result, model.sha256)
    for task in EVALUATIONS:
        for name in getattr(args, task):
            for one in ICINW if name == "icinw" else [name]:
                try:
                    keep(f"{task} {testsets.known_name(one)}",
                         evaluate_set(task, one, model, tokenizer, args))
                except (OSError, ValueError, torch.OutOfMemoryError) as error:
                    # icinw_mean names those of the twenty that are missing.
                    if name != "icinw" or not isinstance(error, FileNotFoundError):
                        failures.append(f"{task} {one}: {sentence_of(error)}")
    parts = {name: results[f"zeroshot {name}"] for name in ICINW if f"zeroshot {name}" in results}
    if "icinw" in args.zeroshot and parts:
        keep("zeroshot icinw", icinw_mean(parts, args.root))
    elif "icinw" in args.zeroshot:
        failures.append(f"none of ICinW's data sets is under {args.root}")
    return config.method, results


def run(args):
    """Evaluate all checkpoints and print ONE table.  Raises ValueError for what has failed."""
    ranks = init_distributed()
    if ranks.world_size > 1:
        raise ValueError("an evaluation runs in one process: start it with python, not torchrun")
    methods = []
    columns = {}
    failures = []
    for path in dict.fromkeys(args.checkpoint or [newest_checkpoint()]):
        try:
            method, columns[str(path)] = evaluate_checkpoint(path, ranks.device, args, failures)
            methods.append(method)
        except (OSError, ValueError) as error:
            failures.append(sentence_of(error))
    if any(columns.values()):
        print(table(columns, methods))
    if failures:
        raise ValueError("; ".join(dict.fromkeys(failures)))


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    sets = dict(nargs="+", metavar="NAME|PATH", default=[])
    parser.add_argument("--zeroshot", **sets, help="imagenet, one of ICinW's twenty, icinw for all "
                        "of them, or a folder with one folder of pictures per class")
    parser.add_argument("--retrieval", **sets, help="flickr30k, coco, or a folder with "
                        "karpathy.json or dataset*.json and its pictures")
    parser.add_argument("--linear", **sets, help="imagenet, one of ICinW's, or a folder with class "
                        "folders in train/ and test/")
    parser.add_argument("--dense", **sets, help="ade20k, or a folder with images/, labels/ and "
                        "classes.txt")
    parser.add_argument("--checkpoint", nargs="+", help=f"a column each: {FORMATS} (default: the "
                        "newest under runs/)")
    parser.add_argument("--root", default=os.environ.get("MASKCLIP_DATA", "data"),
                        help="where named sets are (default: %(default)s)")
    parser.add_argument("--split", choices=("train", "restval", "val", "test"), default="test",
                        help="of a retrieval set (default: %(default)s)")
    parser.add_argument("--templates", type=int, choices=(80, 7), default=80,
                        help="ImageNet's prompts: CLIP's 80 or SLIP's 7 (default: %(default)s)")
    parser.add_argument("--synonyms", action="store_true",
                        help="zero-shot with all names of a class (SLIP), not its first (ELEVATER)")
    parser.add_argument("--names", metavar="FILE",
                        help="lines FOLDER<tab>NAME, for class folders of your own")
    args = parser.parse_args()
    if not (args.zeroshot or args.retrieval or args.linear or args.dense):
        parser.error("nothing to do: give --zeroshot, --retrieval, --linear or --dense")
    for flag, is_used in (("names", args.zeroshot), ("synonyms", args.zeroshot),
                          ("split", args.retrieval),
                          ("templates", "imagenet" in map(testsets.known_name, args.zeroshot))):
        if getattr(args, flag) != parser.get_default(flag) and not is_used:
            parser.error(f"--{flag} has no effect on what is asked for")
    run_program("evaluate.py", lambda: run(args))


if __name__ == "__main__":
    main()
