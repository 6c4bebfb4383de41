"""Frozen evaluation of a checkpoint: zero-shot, retrieval, linear probe, patch-word segmentation, word maps.

Sources: CLIP (prompt ensembles, linear probe by L-BFGS), CLIP_benchmark (recall), vision-evaluation (metrics),
Zhou et al. 2022 (dense scores without training).  The newest checkpoint under runs/ is taken unless --checkpoint.

    python evaluate.py --zeroshot demo --retrieval demo --dense demo
    python evaluate.py --zeroshot FOLDER/WITH/CLASS/FOLDERS --checkpoint runs/demo-maskclip/last.pt
    python evaluate.py --heatmap picture.png "a red star above a blue circle"
"""
import argparse
import json
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import model as models
from tokenizer import Tokenizer, write_atomically

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP

# ---------------------------------------------------------------- loading

def newest_checkpoint(runs="runs"):
    """The last.pt under `runs` that was written last.  Raises FileNotFoundError where there is none."""
    found = sorted(Path(runs).glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no checkpoint under {Path(runs).resolve()}: train one (python train.py) or name one "
                                "with --checkpoint")
    return found[-1]


def read_checkpoint(path):
    """A checkpoint of train.py as a dict, without running any code in it.  Raises FileNotFoundError or ValueError."""
    state = _load(path)
    if "model_config" not in state:
        raise ValueError(f"{path} is not a checkpoint of this project: it has no 'model_config'")
    return state


# What torch.load has been seen to raise on files that are spoilt or of another kind.
DAMAGED = (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, ValueError, struct.error, OSError)


def _load(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        if isinstance(error, OSError) and error.filename:  # not there, no file, not ours to read
            raise
        if "TorchScript" in str(error):
            raise ValueError(f"{path} is a program (TorchScript, as OpenAI's downloads are), which is not run here: if "
                             "you trust it, torch.save(torch.jit.load(PATH).state_dict(), NEW) and give NEW") from error
        raise ValueError(f"{path} is not a checkpoint of this project, or is damaged "
                         f"({type(error).__name__}: {str(error).partition(chr(10))[0][:100]})") from error
    return state if isinstance(state, dict) else {}


def read_weights(path):
    """Weights to start from (train.py --init), in our names.  No code in the file is run.

    -> {"model": {name: tensor}, "changes": {field of ModelConfig: value}}, and for our own checkpoints "tokenizer".
    Known: our checkpoints; OpenAI's CLIP and open_clip's ViTs, whose normalisation of pixels is folded into the patch
    embedding; timm's and MAE's ViTs, without their heads.  Raises FileNotFoundError, or ValueError for anything else.
    """
    state = _load(path)
    if {"model_config", "model", "tokenizer"} <= state.keys():
        own = {name: state["model_config"][name] for name in ("quick_gelu", "pre_norm", "patch_bias", "image_norm_eps")}
        return dict(model=state["model"], changes=own, tokenizer=state["tokenizer"])
    for key in ("state_dict", "model"):  # training scripts put it there
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {str(name).removeprefix("module."): x for name, x in state.items() if isinstance(x, torch.Tensor)}
    if {"visual.conv1.weight", "visual.class_embedding", "visual.proj", "text_projection", "ln_final.weight",
            "token_embedding.weight"} <= state.keys():
        openai = "input_resolution" in state  # these have QuickGELU; of open_clip's, few have
        return dict(model=_from_clip(state), changes=dict(pre_norm=True, image_norm_eps=1e-5, quick_gelu=(openai,) * 2))
    if "blocks.0.attn.qkv.weight" in state and "patch_embed.proj.weight" in state:
        heads = ("head.", "fc_norm.", "decoder", "mask_token")
        return dict(model={f"visual.{name}": x for name, x in state.items() if not name.startswith(heads)}, changes={})
    raise ValueError(f"{path} holds no weights that are known here: our checkpoints, OpenAI CLIP's, open_clip's, "
                     f"timm's or MAE's ViTs; its first keys are {', '.join(list(map(str, state))[:4])}")


def _from_clip(state):
    """OpenAI's names -> ours.  Their pixels are ours * a + b: a goes into the patch embedding, b into its bias."""
    ours = {}
    for name, x in state.items():
        for old, new in (("transformer.resblocks", "blocks"), ("ln_1", "norm1"), ("ln_2", "norm2"), ("c_fc", "fc1"),
                         ("c_proj", "fc2"), ("in_proj_", "qkv."), ("out_proj", "proj"), ("ln_pre", "norm_pre"),
                         ("ln_post", "norm"), ("positional_embedding", "pos_embed")):
            name = name.replace(old, new)
        ours[name] = x.float()
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    a = torch.tensor(data.IMAGENET_STD) / std
    b = (torch.tensor(data.IMAGENET_MEAN) - mean) / std
    conv = ours.pop("visual.conv1.weight")
    # a row for [MASK], and the names that hold a part of ours
    ours |= {"visual.patch_embed.proj.weight": conv * a[:, None, None],
             "visual.patch_embed.proj.bias": (conv * b[:, None, None]).sum((1, 2, 3)),
             "visual.cls_token": ours.pop("visual.class_embedding")[None, None],
             "visual.pos_embed": ours["visual.pos_embed"][None],
             "image_projection.weight": ours.pop("visual.proj").T,
             "text_projection.weight": ours.pop("text_projection").T}
    for name in [name for name in ours if name.startswith(("blocks.", "pos_embed", "token_embedding"))]:
        ours["text." + name] = ours.pop(name)
    words = ours["text.token_embedding.weight"]
    ours["text.token_embedding.weight"] = torch.cat([words, words.new_zeros(1, words.size(1))])
    ours |= {f"text.norm.{kind}": ours.pop(f"ln_final.{kind}") for kind in ("weight", "bias")}
    return {name: x for name, x in ours.items() if name not in ("input_resolution", "context_length", "vocab_size",
                                                               "attn_mask")}


def load_model(path):
    """A checkpoint of train.py -> (model in eval mode, tokenizer; None for methods without text).

    Raises FileNotFoundError, or ValueError for what is no checkpoint, is damaged, or is of another version.
    """
    state = read_checkpoint(path)
    try:
        model = models.build(models.ModelConfig(**state["model_config"]))
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError, TypeError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit this version of model.py: {why}") from error
    return model.eval(), saved_tokenizer(state) if hasattr(model, "text") else None


def saved_tokenizer(state):
    """The tokenizer of a checkpoint, which holds its merges as "left right"."""
    return Tokenizer([tuple(line.split(" ")) for line in state["tokenizer"]])


# ---------------------------------------------------------------- features

def _device(model):
    return next(model.parameters()).device


class _Pictures(torch.utils.data.Dataset):
    """Picture files -> uint8 pixels (H, W, 3), by the evaluation view."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        """Raises ValueError that names the file where it cannot be read: no test picture is ever left out."""
        try:
            image = data.decode(Path(self.paths[i]).read_bytes())
        except data.BAD_IMAGE as error:
            raise ValueError(f"cannot read the test picture {self.paths[i]}: {error}") from error
        return torch.from_numpy(np.array(data.center_crop(image, self.size)))


def shared_out(encode, items):
    """encode(items) -> (n, ...) on the CPU, each rank doing its part: every item once, none added to even parts out."""
    if not (dist.is_available() and dist.is_initialized()):
        return encode(items)
    rank, world = dist.get_rank(), dist.get_world_size()
    mine, error, parts = items[rank::world], None, [None] * world
    try:
        mine = encode(mine) if mine else None
    except (OSError, ValueError) as failed:  # told to all ranks, or the others would wait for this one
        mine, error = None, str(failed)
    dist.all_gather_object(parts, (mine, error))
    for _, error in parts:
        if error:
            raise ValueError(error)
    parts = [part for part, _ in parts]
    rows = parts[0].new_empty(len(items), *parts[0].shape[1:])
    for other in range(min(world, len(items))):
        rows[other::world] = parts[other]
    return rows


@torch.no_grad()
def encode_pictures(encode, paths, model, batch_size=256):
    """encode(pixels (B, 3, H, W) normalised) over picture files, in order.  -> float32 on the CPU (n, ...)"""
    def encoded(paths):
        pictures = _Pictures(paths, model.config.image_size)
        workers = min(8, os.cpu_count() or 1, len(paths) // 2000)  # a small set is done before a worker has started
        loader = torch.utils.data.DataLoader(pictures, batch_size, num_workers=workers)
        # one bar, on a terminal; train.py and torchrun may have many ranks
        bar = tqdm(loader, "pictures", disable=None if os.environ.get("RANK", "0") == "0" else True, leave=False)
        return torch.cat([encode(data.normalize(batch.to(_device(model)))).float().cpu() for batch in bar])
    return shared_out(encoded, paths)


@torch.no_grad()
def encode_texts(model, tokenizer, texts, batch_size=512):
    """Unit text features (n, E) on the CPU.  Batches hold texts of like length, so little is padding."""
    def encoded(texts):
        tokens = [tokenizer(text, model.config.context_length)[0] for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
        out = torch.empty(len(texts), model.config.embed_dim)
        for start in range(0, len(order), batch_size):
            part = order[start:start + batch_size]
            rows = torch.nn.utils.rnn.pad_sequence([tokens[i] for i in part], batch_first=True)
            out[part] = F.normalize(model.encode_text(rows.to(_device(model))).float(), dim=1).cpu()
        return out
    return shared_out(encoded, texts)


def zeroshot_classifier(model, tokenizer, classnames, templates):
    """One row per class: the mean of the unit features of its prompts, made unit again (CLIP).  -> (C, E)

    templates: sentences with {} in the place of the class name.
    """
    prompts = [template.replace("{}", name) for name in classnames for template in templates]
    features = encode_texts(model, tokenizer, prompts)
    return F.normalize(features.view(len(classnames), len(templates), -1).mean(1), dim=1)


# ---------------------------------------------------------------- metrics: tensors or arrays -> float in [0, 1]

def accuracy(scores, targets):
    """Share of rows whose highest score is the target's.  scores (n, C), targets (n,)"""
    return (torch.as_tensor(scores).argmax(1) == torch.as_tensor(targets)).float().mean().item()


def mean_per_class(scores, targets):
    """Recall averaged over the classes that occur.  scores (n, C), targets (n,)"""
    scores, targets = torch.as_tensor(scores), torch.as_tensor(targets)
    hit = (scores.argmax(1) == targets).double()
    return torch.stack([hit[targets == c].mean() for c in targets.unique()]).mean().item()


def map_11point(scores, targets):
    """VOC 2007's mean average precision as ELEVATER computes it.  scores (n, C), targets (n, C) of 0 and 1

    For recall 1.0, 0.9 .. 0: the best precision at that recall or above; mean over the 11, then over classes.  Equal
    scores are one cut.  At recall 0 the precision is 1 by definition (scikit-learn's last point of the curve).
    """
    means = []
    if not torch.as_tensor(targets).any(0).all():
        raise ValueError("11-point mAP needs a positive example of every class")
    for score, target in zip(torch.as_tensor(scores).double().T, torch.as_tensor(targets).double().T):
        score, order = score.sort(descending=True)
        hits = target[order].cumsum(0)
        cut = torch.cat([score[1:] != score[:-1], torch.tensor([True])])   # behind the last of equal scores
        precision = (hits / torch.arange(1, len(score) + 1))[cut]
        recall = (hits / target.sum())[cut]
        # 1e-9: hits / positives is compared with tenths, which are no binary fractions
        best = [precision[recall >= level / 10 - 1e-9].max().item() for level in range(1, 11)]
        means.append((sum(best) + 1.0) / 11)
    return sum(means) / len(means)


def roc_auc(scores, targets):
    """Area under the ROC curve: share of (positive, negative) pairs in order, ties counting half.

    scores (n,) or (n, 2), of which column 1 is used; targets (n,) of 0 and 1.
    """
    scores, targets = torch.as_tensor(scores), torch.as_tensor(targets)
    score = (scores[:, 1] if scores.ndim == 2 else scores).double()
    _, place, count = score.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[place]        # 1-based, equal scores share their mean rank
    positives = (targets == 1).sum().double()
    negatives = len(score) - positives
    return ((rank[targets == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives)).item()


def recall_at_k(similarity, text_to_image, ks=(1, 5, 10)):
    """similarity (n_images, n_texts), text_to_image (n_texts,) -> {"i2t": {k: r}, "t2i": {k: r}}  (CLIP_benchmark)

    i2t: share of images with at least one own text among the k most similar; t2i: share of texts whose image is.
    """
    similarity, text_to_image = torch.as_tensor(similarity), torch.as_tensor(text_to_image)
    images = torch.arange(len(similarity))

    def recall(rows, is_own):
        top = rows.topk(min(max(ks), rows.size(1)), dim=1).indices
        hit = is_own(top)
        return {k: hit[:, :k].any(1).float().mean().item() for k in ks}
    return dict(i2t=recall(similarity, lambda top: text_to_image[top] == images[:, None]),
                t2i=recall(similarity.T, lambda top: top == text_to_image[:, None]))


# ---------------------------------------------------------------- evaluations
# Each returns a dict: "scores" {name: share in [0, 1]}, "chance" (of the first score), "over" (what was counted).

def zeroshot(model, tokenizer, folder):
    """Zero-shot classification of a class folder (CLIP).  "per_class" holds each class's recall."""
    paths, labels, names = data.class_folder(folder)
    spoken = [name.replace("_", " ") for name in names]
    classifier = zeroshot_classifier(model, tokenizer, spoken, data.templates_of(folder))
    scores, targets = encode_unit(model, paths) @ classifier.T, torch.tensor(labels)
    return dict(scores={"top-1": accuracy(scores, targets), "mean per class": mean_per_class(scores, targets)},
                chance=1 / len(names), over=f"{len(paths)} pictures of {len(names)} classes",
                per_class={name: accuracy(scores[targets == c], c) for c, name in enumerate(names)})


def encode_unit(model, paths):
    """Unit image features (n, E) of picture files."""
    return F.normalize(encode_pictures(model.encode_image, paths, model), dim=1)


def retrieval(model, tokenizer, folder):
    """Image-text retrieval on the test split of a Karpathy json."""
    paths, texts, owners = data.karpathy(folder)
    similarity = encode_unit(model, paths) @ encode_texts(model, tokenizer, texts).T
    recall = recall_at_k(similarity, owners)
    return dict(scores={f"{way} R@{k}": r for way, row in recall.items() for k, r in row.items()},
                chance=1 / len(paths), over=f"{len(paths)} pictures, {len(texts)} texts")


def dense(model, tokenizer, folder):
    """Patch-word segmentation: each pixel goes to the class whose words are nearest to its patch.

    folder/{images,labels}/ hold pictures and label pictures of the same names; label 0 is left out, k is line k of
    folder/classes.txt.
    """
    folder = Path(folder)
    if not (folder / "classes.txt").is_file():
        raise FileNotFoundError(f"no classes.txt in {folder.resolve()}: a segmentation set is a folder with images/, "
                                "labels/ (PNG, 0 = left out) and classes.txt")
    names = (folder / "classes.txt").read_text("utf-8").splitlines()
    paths = data.picture_files(folder / "images")
    if not paths:
        raise FileNotFoundError(f"no pictures in {folder / 'images'}")
    classifier = zeroshot_classifier(model, tokenizer, names, data.templates_of(folder))
    features = F.normalize(encode_pictures(model.encode_patches, paths, model), dim=2)    # (n, N, E)
    side, size = model.config.grid, model.config.image_size
    confusion = torch.zeros(len(names), len(names), dtype=torch.long)
    for path, rows in zip(paths, features):
        label = Image.open(folder / "labels" / f"{path.stem}.png")
        label = torch.from_numpy(np.array(data.center_crop(label, size, Image.NEAREST))).long()      # (size, size)
        maps = (rows @ classifier.T).T.reshape(1, -1, side, side)                                    # (1, C, g, g)
        guess = F.interpolate(maps, (size, size), mode="bilinear")[0].argmax(0)                      # (size, size)
        if label.max() > len(names):
            raise ValueError(f"{folder}/labels/{path.stem}.png holds {label.max()}: classes.txt has {len(names)} lines")
        seen = label > 0
        confusion += torch.bincount((label[seen] - 1) * len(names) + guess[seen],
                                    minlength=confusion.numel()).view_as(confusion)
    return dict(scores={"mIoU": mean_iou(confusion),
                        "pixel accuracy": (confusion.trace() / confusion.sum()).item()},
                chance=1 / (2 * len(names) - 1), over=f"{len(paths)} pictures, {len(names)} classes")


def mean_iou(confusion):
    """Mean over the classes that occur, as label or guess, of intersection / union.  confusion (C, C) [label, guess]"""
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return (confusion.diag()[union > 0] / union[union > 0]).mean().item()


def linear(model, folder):
    """Linear probe: logistic regression on the frozen class token before the projection, folder/{train,test}/CLASS.

    CLIP's way: L-BFGS on the penalised mean cross-entropy; the penalty is the best of a sweep on a fifth of the
    training set, then all of it is fitted.
    """
    def features(part):
        paths, labels, names = data.class_folder(Path(folder) / part)
        return encode_pictures(lambda x: model.visual(x)[:, 0], paths, model), torch.tensor(labels), names
    (x, y, names), (x_test, y_test, test_names) = features("train"), features("test")
    if names != test_names:
        raise ValueError(f"{folder}: train/ and test/ hold different classes: {sorted(set(names) ^ set(test_names))}")
    held_out = torch.arange(len(x)) % 5 == 0  # class folders are in order: a fifth of each class
    tried = {}
    for penalty in [10.0 ** k for k in range(-6, 1)]:  # our choice; CLIP sweeps 96 steps of a like range
        predict = logistic_regression(x[~held_out], y[~held_out], len(names), penalty)
        tried[penalty] = accuracy(predict(x[held_out]), y[held_out])
    penalty = max(tried, key=tried.get)
    return dict(scores={"top-1": accuracy(logistic_regression(x, y, len(names), penalty)(x_test), y_test)},
                chance=1 / len(names), over=f"{len(x_test)} pictures of {len(names)} classes, {len(x)} to train")


def logistic_regression(x, y, classes, penalty):
    """Minimise mean cross-entropy + penalty / 2 * |W|^2 by L-BFGS.  x (n, D), y (n,) -> function (m, D) -> (m, C)"""
    mean, std = x.mean(0), x.std(0) + 1e-6  # the scale of a feature is no information
    weight = torch.zeros(x.size(1), classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy((x - mean) / std @ weight + bias, y) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return lambda rows: ((rows - mean) / std @ weight + bias).detach()


# ---------------------------------------------------------------- pictures

# Five colours of matplotlib's viridis, dark to light: legible in grey and to the colour-blind.
VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], float)
# Words that name no thing in a picture.
SMALL_WORDS = set("a an the and or of in on at to with by is are there left right above below picture".split())


def heatmap(model, tokenizer, image, caption, path, side=224):
    """Write a PNG: the picture, and for each word of the caption where in the picture it is.

    A map is the similarity of each patch to the word, less the word's mean over the picture (where is it?) and the
    patch's mean over the words (which is it?), where there are more than two.
    Each runs from its own lowest to its own highest value, which are printed.
    """
    words = list(dict.fromkeys(word.strip(".,;:!?\"'") for word in caption.lower().split()))
    words = [word for word in words if word and word not in SMALL_WORDS]
    if not words:
        raise ValueError(f"--heatmap: the caption {caption!r} has no word to look for")
    pixels = torch.from_numpy(np.array(data.center_crop(image, model.config.image_size)))[None]
    with torch.no_grad():
        patches = F.normalize(model.encode_patches(data.normalize(pixels.to(_device(model)))).float().cpu()[0], dim=1)
    maps = zeroshot_classifier(model, tokenizer, words, ("{}", "a {}")) @ patches.T                      # (words, N)
    if len(words) > 2:  # of two words, each map would be the other's negative
        maps = maps - maps.mean(0)
    maps = (maps - maps.mean(1, keepdim=True)).view(-1, model.config.grid, model.config.grid).numpy()
    picture = data.center_crop(image, side)
    panels = [("picture", picture)]
    for word, values in zip(words, maps):
        low, high = values.min(), values.max()
        shown = np.array(Image.fromarray(values).resize((side, side), Image.BICUBIC))
        panels.append((f"{word}  ({low:+.2f} to {high:+.2f})",
                       Image.blend(picture, _coloured((shown - low) / (high - low + 1e-9)), 0.7)))
    _sheet(panels, caption).save(path)


def _coloured(share):
    """Values from 0 to 1 -> RGB picture in VIRIDIS."""
    place = share.clip(0, 1) * (len(VIRIDIS) - 1)
    channels = [np.interp(place, range(len(VIRIDIS)), channel) for channel in VIRIDIS.T]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def _sheet(panels, title, columns=7, gap=8):
    """Titled pictures in rows, under a title, above the colour scale."""
    side, line = panels[0][1].width, 24
    big, small = ImageFont.load_default(20), ImageFont.load_default(16)
    columns = min(columns, len(panels))
    width = max(columns * (side + gap) + gap, int(big.getlength(title)) + 2 * gap, 470)
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (width, 40 + rows * (side + line + gap) + 36), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, 8), title, "black", big)
    for i, (name, picture) in enumerate(panels):
        x, y = gap + i % columns * (side + gap), 40 + i // columns * (side + line + gap)
        pen.text((x, y), name, "black", small)
        sheet.paste(picture, (x, y + line))
    y = sheet.height - 28
    pen.text((gap, y), "relative similarity: lowest", "black", small)
    sheet.paste(_coloured(np.tile(np.linspace(0, 1, 160), (14, 1))), (220, y + 3))
    pen.text((390, y), "highest", "black", small)
    return sheet


# name of a panel -> the values of log.jsonl in it
PANELS = {
    "contrastive loss": ("image", "text"), "masked and self-supervised losses": ("distill", "mlm", "pixel", "simclr"),
    "accuracy in the batch": ("accuracy",), "score while training": ("zeroshot", "linear"),
    "scale 1 / sigma": ("scale",), "learning rate": ("lr",), "teacher's momentum": ("ema",),
    "norm of the gradient": ("grad_norm",), "pictures/s": ("pictures_per_s",),
    "share of time waiting for data": ("data_wait",),
}
OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by colour-blind eyes too


def curves(log, path, width=460, height=190):
    """Draw the curves of a log.jsonl over the steps as an SVG: two panels in a row, for a browser or a README."""
    records = [json.loads(line) for line in Path(log).read_text("utf-8").splitlines()]
    drawn, steps = [], (records[0]["step"], records[-1]["step"]) if records else (0, 0)
    for title, names in PANELS.items():
        lines = {name: [(r["step"], r[name]) for r in records if r.get(name) is not None] for name in names}
        lines = {name: points for name, points in lines.items() if points}
        if lines:
            x, y = len(drawn) % 2 * width, len(drawn) // 2 * height
            drawn.append(f'<g transform="translate({x} {y})">{_panel(title, lines, steps, width, height)}</g>')
    size = 2 * width, -(-len(drawn) // 2) * height
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
            f'height="{size[1]}" font-family="sans-serif" font-size="12">')
    lines = [head, '<rect width="100%" height="100%" fill="white"/>', *drawn, "</svg>\n"]
    write_atomically(Path(path), "\n".join(lines).encode())


def _panel(title, lines, steps, width, height, left=72, top=28, right=14, bottom=26):
    """One panel of `curves`: title and names, values at the axes, and a line for each of {name: [(step, value)]}."""
    values = [value for points in lines.values() for _, value in points]
    (first, last), low, high = steps, min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10

    def place(step, value):
        return (left + (width - left - right) * (step - first) / max(1, last - first),
                height - bottom - (height - top - bottom) * (value - low) / (high - low))
    out = [f'<text x="{left}" y="18" font-weight="bold" fill="#222">{title}</text>']
    for value in (low, (low + high) / 2, high):
        y = place(first, value)[1]
        out.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#ddd"/>'
                   f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{value:.3g}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        out.append(f'<text x="{place(step, low)[0]:.1f}" y="{height - 8}" text-anchor="{anchor}" fill="#555">'
                   f'step {step:,}</text>')
    end = width - right
    for name, colour in reversed(list(zip(lines, OKABE_ITO))):
        points = lines[name][::max(1, len(lines[name]) // 1000)]  # more than the panel has pixels
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        dot = '<circle cx="{:.1f}" cy="{:.1f}" r="2.5" fill="{}"/>'.format(*place(*points[-1]), colour)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>{dot}')
        if len(lines) > 1:
            out.append(f'<text x="{end}" y="18" text-anchor="end" fill="{colour}">{name}</text>')
            end -= 8 * len(name) + 10
    return "".join(out)


# ---------------------------------------------------------------- the command line

def table(results):
    """{name: what an evaluation returned} -> text, one line per score, in per cent."""
    lines, wide = [], 2 + max(map(len, results), default=0)
    for name, r in results.items():
        note = f"chance {100 * r['chance']:.1f}; {r['over']}"
        for score, value in r["scores"].items():
            lines.append(f"{name:<{wide}}{score:<16}{100 * value:>6.1f}   {note}".rstrip())
            name = note = ""
    return "\n".join(lines)


def find(name, root, part):
    """A test set: the path NAME, or ROOT/NAME/`part` (and the demo is drawn).  Raises FileNotFoundError."""
    if name == "demo":
        data.draw_demo(Path(root) / "demo")
    tried = [Path(root) / name / part, Path(name)]
    for folder in tried:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no test set '{name}': looked for the folders {' and '.join(map(str, tried))} "
                            "(--root or $MASKCLIP_DATA name another place)")


# flag -> (the part of a named data set that it reads, the function)
EVALUATIONS = dict(zeroshot=("classes/test", zeroshot), retrieval=("val", retrieval), dense=("dense", dense),
                   linear=("classes", lambda model, tokenizer, folder: linear(model, folder)))


def run(args):
    """What the command line asks for."""
    checkpoint = Path(args.checkpoint) if args.checkpoint else newest_checkpoint()
    model, tokenizer = load_model(checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{checkpoint}: {model.config.method}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    results = {}
    for flag, (part, evaluate) in EVALUATIONS.items():
        for name in getattr(args, flag) or ():
            if tokenizer is None and flag != "linear":
                raise ValueError(f"--{flag} needs a text encoder, and {model.config.method} has none: use --linear")
            results[f"{flag} {name}"] = evaluate(model, tokenizer, find(name, args.root, part))
    if results:
        print(table(results))
    if args.heatmap:
        if tokenizer is None:
            raise ValueError(f"--heatmap needs a text encoder, and {model.config.method} has none")
        file, caption = args.heatmap
        try:
            image = data.decode(Path(file).read_bytes())
        except data.BAD_IMAGE as error:
            raise ValueError(f"--heatmap: cannot read the picture {file}: {error}") from error
        heatmap(model, tokenizer, image, caption, args.output)
        print(f"wrote {args.output}")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", help="last.pt of a run; else the newest under runs/")
    parser.add_argument("--root", default=os.environ.get("MASKCLIP_DATA", "data"), help="where named sets lie")
    parser.add_argument("--zeroshot", nargs="+", metavar="NAME|PATH", help="folder with one folder of pictures a class")
    parser.add_argument("--retrieval", nargs="+", metavar="NAME|PATH", help="folder with karpathy.json and images/")
    parser.add_argument("--dense", nargs="+", metavar="NAME|PATH", help="folder with images/, labels/, classes.txt")
    parser.add_argument("--linear", nargs="+", metavar="NAME|PATH", help="folder with train/ and test/ class folders")
    parser.add_argument("--heatmap", nargs=2, metavar=("IMAGE", "CAPTION"), help="write a word map of a picture")
    parser.add_argument("--output", default="heatmap.png", help="where --heatmap writes (default: heatmap.png)")
    args = parser.parse_args()
    if not any((args.zeroshot, args.retrieval, args.dense, args.linear, args.heatmap)):
        parser.error("nothing to do: give --zeroshot, --retrieval, --dense, --linear or --heatmap")
    try:
        run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate.py: error: {str(error).splitlines()[-1]}")


if __name__ == "__main__":
    main()
