"""Semantic segmentation: UPerNet on ADE20K (paper: 50.5 mIoU), or a linear head on frozen features.

    python downstream/segment.py --data ade20k --checkpoint runs/yfcc15m-maskclip/last.pt
    python downstream/segment.py --data demo --head linear      # or FOLDER/{images,labels}

The loop is `train`.  Ideas: UPerNet (Xiao et al. 2018) on a ViT as BEiT has it, in mmsegmentation's
form and names, so that its weights load here.  The recipe is mmsegmentation's for MAE; the linear
head is iBOT's.
"""
import math
import sys
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluate
import model as models
from downstream import finetune
from support import testsets
from support.runtime import init_distributed, rank0_first, run_program
from support.settings import flag, parse_flags

IGNORE = 255  # label of pixels that are in no class, or outside the picture


@dataclass
class SegmentConfig(finetune.TowerConfig):
    """Everything that fixes a run; saved in each checkpoint.  Defaults: mmsegmentation's, MAE."""
    data: str = flag("ade20k", "ade20k, demo, or a folder of pictures and label PNGs")
    head: str = flag("upernet", "upernet, or linear: on the last block's tokens, all else frozen")
    image_size: int = flag(512, "pixels a side of the crops; positions are resized")
    epochs: int = flag(127, "passes over the data; 127 of ADE20K's are 160,000 steps of 16")
    batch_size: int = flag(16, "GLOBAL batch in pictures, whatever the number of GPUs")
    lr: float = flag(1e-4, "peak learning rate of the head")
    warmup_epochs: float = flag(1.2, "epochs of linear warm-up; 1.2 of ADE20K's are 1,500 steps")


# What changes in the defaults.  Tiny is our choice, for a laptop: a few hundred pictures.
TINY = dict(image_size=64, epochs=30, lr=1e-3, warmup_epochs=1.0, layer_decay=0.75, drop_path=0.0)
LINEAR = dict(lr=8e-4, drop_path=0.0)  # iBOT


def recipe(width, given):
    """What the tower's width and --head change in the defaults."""
    tiny = TINY if width == 128 else {}
    return tiny | LINEAR if given.get("head") == "linear" else tiny


# ---------------------------------------------------------------- the networks

def named(**modules):
    """nn.Sequential with mmsegmentation's names."""
    return nn.Sequential(OrderedDict(modules))


def conv_module(width, channels, size):
    """Convolution, batch norm, ReLU."""
    return named(conv=nn.Conv2d(width, channels, size, padding=size // 2, bias=False),
                 bn=nn.BatchNorm2d(channels), activate=nn.ReLU())


def resized(x, size):
    """(B, C, h, w) -> (B, C, *size), bilinear."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class UPerHead(nn.Module):
    """Pyramid pooling on the smallest map, a feature pyramid, then all four scales together."""

    def __init__(self, width, n_classes, channels, pools=(1, 2, 3, 6)):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(pool), conv_module(width, channels, 1))
            for pool in pools)
        self.bottleneck = conv_module(width + len(pools) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(conv_module(width, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(conv_module(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = conv_module(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, n_classes, 1)

    def forward(self, maps):
        """[(B, D, h, w)] from large to small -> (B, C, h, w) of the largest."""
        pooled = [resized(pool(maps[3]), maps[3].shape[2:]) for pool in self.psp_modules]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        laterals.append(self.bottleneck(torch.cat([maps[3], *pooled], 1)))
        for i in (2, 1, 0):  # from the smallest up
            laterals[i] = laterals[i] + resized(laterals[i + 1], laterals[i].shape[2:])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals)] + laterals[3:]
        x = self.fpn_bottleneck(torch.cat([resized(x, maps[0].shape[2:]) for x in outs], 1))
        return self.conv_seg(self.dropout(x))


class UPerNet(nn.Module):
    """An image tower, a pyramid of four of its blocks, a head, one more on the third map."""

    def __init__(self, config, n_classes):
        super().__init__()
        self.config = config
        width = config.width
        n = config.depth
        self.visual = models.ViT(config)
        self.visual.norm.requires_grad_(False)  # not used: maps are of the residual stream (BEiT)
        self.layers = [max(1, n // 3), max(1, n // 2), max(1, 2 * n // 3), n]   # BEiT: 4, 6, 8, 12
        self.neck = nn.ModuleDict(dict(
            upsample_4x=nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2), nn.BatchNorm2d(width),
                                      nn.GELU(), nn.ConvTranspose2d(width, width, 2, 2)),
            upsample_2x=nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2))))
        self.decode_head = UPerHead(width, n_classes, channels=width)           # 768 in ViT-B
        self.auxiliary_head = named(convs=nn.Sequential(conv_module(width, width // 3, 3)),  # 256
                                    dropout=nn.Dropout2d(0.1),
                                    conv_seg=nn.Conv2d(width // 3, n_classes, 1))
        models.init_weights(self)
        nn.init.normal_(self.decode_head.conv_seg.weight, std=0.01)             # mmsegmentation
        nn.init.normal_(self.auxiliary_head.conv_seg.weight, std=0.01)

    def forward(self, images):
        """(B, 3, S, S) normalised -> (B, C, S, S); of the auxiliary head (B, C, g, g)."""
        x = self.visual.embed(images)                                           # (B, 1 + N, D)
        maps = {}
        for number, block in enumerate(self.visual.blocks, 1):
            x = block(x)
            maps[number] = as_map(x, self.config.grid)
        a, b, c, d = (maps[number] for number in self.layers)                   # (B, D, g, g)
        pyramid = [self.neck["upsample_4x"](a), self.neck["upsample_2x"](b), c, F.max_pool2d(d, 2)]
        logits = resized(self.decode_head(pyramid), images.shape[2:])
        return logits, self.auxiliary_head(c)


class Linear(nn.Module):
    """A linear classifier of the last block's normalised patches; the tower is frozen (iBOT)."""

    def __init__(self, config, n_classes):
        super().__init__()
        self.config = config
        self.visual = models.ViT(config).requires_grad_(False)
        self.conv_seg = nn.Conv2d(config.width, n_classes, 1)
        models.init_weights(self)
        nn.init.normal_(self.conv_seg.weight, std=0.01)

    def forward(self, images):
        """(B, 3, S, S) normalised -> (B, C, S, S), and None for the auxiliary head."""
        x = as_map(self.visual(images), self.config.grid)                       # (B, D, g, g)
        return resized(self.conv_seg(x), images.shape[2:]), None


def as_map(tokens, side):
    """Class token and patches (B, 1 + N, D) -> patches (B, D, side, side)."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))


HEADS = dict(upernet=UPerNet, linear=Linear)


# ---------------------------------------------------------------- pictures with labels

@dataclass
class LabelledPixels(torch.utils.data.Dataset):
    """(epoch, index) -> images (S, S, 3) uint8, labels (S, S), drawn from (seed, epoch, index)."""
    tests: testsets.SegmentationSet
    config: SegmentConfig
    size: int

    def __getitem__(self, key):
        rng = np.random.default_rng([self.config.seed, *key])
        image, label = self.tests.load(key[1])
        shape = rescaled_shape(image, self.size * rng.uniform(0.5, 2.0))        # mmsegmentation
        image = image.resize(shape, Image.BILINEAR)
        label = label.resize(shape, Image.NEAREST)
        image, label = random_crop(image, label, self.size, rng)
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
            label = ImageOps.mirror(label)
        image = recoloured(image, rng)
        return dict(images=torch.from_numpy(np.array(image)),
                    labels=torch.from_numpy(np.array(label)).long())


def rescaled_shape(image, side):
    """The size whose shorter side is `side`, the longer at most 4 times that (mmsegmentation)."""
    short, long = sorted(image.size)
    factor = min(side / short, 4 * side / long)
    return [max(1, round(factor * x)) for x in image.size]


def random_crop(image, label, size, rng, largest=0.75):
    """A square of which no class covers more than `largest`, in ten tries (mmsegmentation)."""
    for _ in range(11):  # the first, and ten more
        x, y = (int(rng.integers(max(side - size, 0) + 1)) for side in image.size)
        box = (x, y, min(x + size, image.width), min(y + size, image.height))
        label_part = label.crop(box)
        counts = np.bincount(np.asarray(label_part).ravel(), minlength=256)[:IGNORE]
        if (counts > 0).sum() > 1 and counts.max() < largest * counts.sum():
            break
    square = Image.new("RGB", (size, size), finetune.MEAN_COLOUR)
    labels = Image.new("L", (size, size), IGNORE)
    square.paste(image.crop(box))
    labels.paste(label_part)
    return square, labels


def recoloured(image, rng):
    """SSD's distortion: brightness, contrast, saturation and hue, each half of the time."""
    contrast_early = rng.random() < 0.5  # else last
    if rng.random() < 0.5:
        shift = rng.uniform(-32, 32)
        image = image.point([min(255, max(0, int(x + shift))) for x in range(256)] * 3)
    if contrast_early:
        image = gained(image, rng)
    hue, saturation, value = image.convert("HSV").split()
    saturation = gained(saturation, rng)
    if rng.random() < 0.5:
        turn = int(rng.integers(-26, 27))  # of 256; 18 of 180
        hue = hue.point([(x + turn) % 256 for x in range(256)])
    image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image if contrast_early else gained(image, rng)


def gained(image, rng):
    """Half of the time, all values times 0.5 to 1.5."""
    if rng.random() < 0.5:
        gain = rng.uniform(0.5, 1.5)
        image = image.point([min(255, int(gain * x)) for x in range(256)] * len(image.getbands()))
    return image


# ---------------------------------------------------------------- the loop and the evaluation

def pixel_loss(logits, labels):
    """Cross entropy of (B, C, h, w), (B, S, S): a mean over ALL pixels, unlabelled ones at zero.

    So the ranks divide by the same number, and DDP's mean is the global batch's (mmsegmentation).
    """
    logits = resized(logits.float(), labels.shape[1:])                          # (B, C, S, S)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / labels.numel()


def train(config):
    """Train as the config says, from last.pt in config.out if there is one; then evaluate."""
    ranks = init_distributed()
    train_set, test_set = rank0_first(lambda: [
        testsets.segmentation_set(config.data, config.root, split) for split in ("train", "test")],
        ranks)
    run = finetune.Run(config, ranks, train_set, train_set.names,
                       lambda shape: HEADS[config.head](shape, len(train_set.names)),
                       finetune.adamw, LabelledPixels)
    optimizer = run.optimizer
    scaler = run.scaler
    evaluation = partial(measure, run.model, test_set, run.amp)

    while not run.stop:
        step = run.progress.step
        warmup = config.warmup_epochs * run.steps_per_epoch
        lr = config.lr * min((step + 1) / (warmup + 1), 1 - step / run.last_step)  # mmsegmentation
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        images, labels, _ = run.next_batch()                    # (B, 3, S, S), (B, S, S)
        run.model.train()
        with run.amp:
            logits, auxiliary = run.network(images)             # (B, C, S, S); (B, C, g, g) or None
        terms = dict(loss=pixel_loss(logits, labels))
        if auxiliary is not None:
            terms["auxiliary"] = 0.4 * pixel_loss(auxiliary, labels)            # BEiT
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(sum(terms.values())).backward()

        # DDP has averaged the gradient, so all ranks see the NaN of one.  In such a step found_inf
        # makes the fused optimiser keep weights and moments.
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), math.inf)
        finite = norm.isfinite()
        optimizer.found_inf = (~finite).float()
        scaler.step(optimizer)
        scaler.update()
        run.progress.count(finite)
        run.log_and_save(terms, lr, norm, "segment", evaluation)
    run.finish(f"segment {test_set.name}", evaluation)


def slide(model, images, size, stride):
    """(1, 3, H, W) -> logits (1, C, H, W), the mean over windows (mmsegmentation).

    A picture smaller than a window is padded meanwhile.
    """
    height, width = images.shape[2:]
    images = F.pad(images, (0, max(0, size - width), 0, max(0, size - height)))
    total = count = 0
    for top in window_starts(images.size(2), size, stride):
        for left in window_starts(images.size(3), size, stride):
            window = model(images[..., top:top + size, left:left + size])[0].float()
            margins = (left, images.size(3) - left - size, top, images.size(2) - top - size)
            total = total + F.pad(window, margins)
            count = count + F.pad(torch.ones_like(window[:, :1]), margins)
    return (total / count)[..., :height, :width]


def window_starts(side, size, stride):
    """Where windows of `size` begin on a side; the last one ends with it."""
    return sorted({min(start, side - size) for start in range(0, side - size + stride, stride)})


@torch.no_grad()
def measure(model, test_set, amp):
    """mIoU and pixel accuracy of pictures at their original sizes.

    Each is seen with its shorter side at the crops' size.
    """
    model.eval()
    n, n_classes = len(test_set.pictures), len(test_set.names)
    size = model.config.image_size
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.long)
    for i in evaluate.progress(range(n), "pictures"):
        image, label = test_set.load(i)
        small = np.array(image.resize(rescaled_shape(image, size), Image.BILINEAR))
        pixels = data.normalize(torch.from_numpy(small)[None].to(evaluate.device_of(model)))
        with amp:
            logits = slide(model, pixels, size, size * 341 // 512)              # mmsegmentation
        guess = resized(logits, image.size[::-1])[0].argmax(0).cpu()            # (H, W)
        confusion += evaluate.confusion_matrix(guess, torch.from_numpy(np.array(label)), n_classes)
    return dict(scores=evaluate.segmentation_scores(confusion), chance=1 / (2 * n_classes - 1),
                over=f"{n:,} pictures, {n_classes} classes",
                protocol=dict(set=test_set.name, path=str(test_set.path), pictures=n,
                              classes=n_classes))


def command_line(argv=None):
    """The command line -> SegmentConfig."""
    given = parse_flags(SegmentConfig, __doc__.splitlines()[0], argv,
                        {"--head linear": LINEAR, "tiny": TINY})
    head = given.get("head", SegmentConfig.head)
    return finetune.make_config(given, SegmentConfig, recipe, f"runs/segment/{{}}-{head}",
                                dict(head=HEADS))


def main():
    """The command line."""
    run_program("segment.py", lambda: train(command_line()))


if __name__ == "__main__":
    main()
