"""Semantic segmentation on an image tower: UPerNet on ADE20K (paper: 50.5 mIoU), or a linear head on frozen features.

    python downstream/segment.py --data ade20k --checkpoint runs/yfcc15m-maskclip/last.pt
    torchrun --nproc_per_node=8 downstream/segment.py --data ade20k --checkpoint mae_pretrain_vit_base.pth
    python downstream/segment.py --data demo --head linear        # the newest checkpoint; FOLDER/{images,labels} too

Ideas: UPerNet (Xiao et al. 2018) on a ViT as BEiT does it, in mmsegmentation's form and names: its weights load here.
The recipe is mmsegmentation's for MAE; the loop, checkpoints, signals and logs are train.py's.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the six files are
import data
import evaluate
import losses
import model as models
import train
from downstream import finetune, pictures
from train import flag

IGNORE = 255  # beside the classes 0 .. C - 1: in none, or not in the picture


@dataclass
class SegmentConfig(finetune.TowerConfig):
    """Everything that fixes a run; saved in each checkpoint.  Defaults: mmsegmentation's for MAE's ViT-B on ADE20K."""
    data: str = flag("ade20k", "ade20k, demo, or a folder of pictures and label PNGs (see README)")
    head: str = flag("upernet", "upernet, or linear: on the last block's tokens, all else frozen (iBOT)")
    image_size: int = flag(512, "pixels a side of the crops, 0: the checkpoint's; positions are resized")
    epochs: int = flag(127, "passes over the data; 127 of ADE20K's are 160,000 steps of 16")
    batch_size: int = flag(16, "GLOBAL batch in pictures, whatever the number of GPUs")
    lr: float = flag(1e-4, "peak learning rate of the head")
    warmup_epochs: float = flag(1.2, "epochs of linear warm-up; 1.2 of ADE20K's are 1,500 steps")


LINEAR = dict(lr=8e-4, drop_path=0.0)  # iBOT's linear head; nothing below it learns
# Our choice, for a laptop: 64 pixels, a few hundred pictures.
SMALL = dict(image_size=64, epochs=30, lr=1e-3, warmup_epochs=1.0, layer_decay=0.75, drop_path=0.0)


def parse(argv=None):
    """The command line -> SegmentConfig."""
    given = train.given(SegmentConfig, __doc__, argv)
    head = given.get("head", SegmentConfig.head)
    if head not in HEADS:
        raise ValueError(f"unknown --head '{head}': one of {', '.join(HEADS)}")

    def recipe(shape, given):
        return (SMALL if shape.width == 128 else {}) | (LINEAR if head == "linear" else {})
    return finetune.resolve(given, SegmentConfig, recipe, f"runs/segment/{{}}-{head}")


# ---------------------------------------------------------------- the networks

class ConvModule(nn.Sequential):
    """Convolution, batch norm, ReLU; mmsegmentation's names."""

    def __init__(self, width, out, size):
        super().__init__()
        self.conv = nn.Conv2d(width, out, size, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.activate = nn.ReLU()


def resized(x, size):
    """(B, C, h, w) -> (B, C, *size), bilinear."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """Four maps of one ViT's scale -> scales 4, 2, 1, 1/2  (BEiT)."""

    def __init__(self, width):
        super().__init__()
        def larger():
            return nn.ConvTranspose2d(width, width, 2, 2)
        self.upsample_4x = nn.Sequential(larger(), nn.BatchNorm2d(width), nn.GELU(), larger())
        self.upsample_2x = nn.Sequential(larger())

    def forward(self, maps):
        """[(B, D, g, g)] -> [(B, D, 4g, 4g), (B, D, 2g, 2g), (B, D, g, g), (B, D, g/2, g/2)]"""
        return [self.upsample_4x(maps[0]), self.upsample_2x(maps[1]), maps[2], F.max_pool2d(maps[3], 2, 2)]


class UPerHead(nn.Module):
    """Pyramid pooling on the smallest map, then a feature pyramid, then all four scales together."""

    def __init__(self, width, classes, channels, pools=(1, 2, 3, 6)):
        super().__init__()
        self.psp_modules = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(pool), ConvModule(width, channels, 1))
                                         for pool in pools)
        self.bottleneck = ConvModule(width + len(pools) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvModule(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, classes, 1)

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


class FCNHead(nn.Module):
    """One convolution and a classifier: the auxiliary head."""

    def __init__(self, width, classes, channels):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(width, channels, 3))
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, x):
        """(B, D, h, w) -> (B, C, h, w)."""
        return self.conv_seg(self.dropout(self.convs(x)))


class UPerNet(nn.Module):
    """An image tower, a pyramid of four of its blocks, the head, and an auxiliary head on the third map."""

    def __init__(self, config, classes):
        super().__init__()
        self.config = config
        self.visual = models.ViT(config)
        self.visual.norm.requires_grad_(False)  # not used: the maps come from the residual stream (BEiT)
        if config.grid < 2:
            raise ValueError(f"UPerNet halves the map of patches: --image-size {config.image_size} is one patch")
        n = config.depth
        self.layers = [max(1, n // 3), max(1, n // 2), max(1, 2 * n // 3), n]  # 4, 6, 8, 12 of 12
        self.neck = Pyramid(config.width)
        self.decode_head = UPerHead(config.width, classes, config.width)          # 768 channels in ViT-B
        self.auxiliary_head = FCNHead(config.width, classes, config.width // 3)   # 256

    def init_head(self, trained):
        """mmsegmentation: classifiers normal, std .01."""
        for head in (self.decode_head, self.auxiliary_head):
            nn.init.normal_(head.conv_seg.weight, std=0.01)

    def forward(self, images):
        """(B, 3, S, S) normalised -> (B, C, S, S); while training also the auxiliary head's, (B, C, g, g)."""
        x, maps = self.visual.embed(images), []
        for number, block in enumerate(self.visual.blocks, 1):
            x = block(x)                                                              # (B, 1 + N, D)
            maps += [as_map(x, self.config.grid)] * self.layers.count(number)
        maps = self.neck(maps)
        logits = resized(self.decode_head(maps), images.shape[2:])
        return (logits, self.auxiliary_head(maps[2])) if self.training else logits


class Linear(nn.Module):
    """A linear classifier of the last block's normalised patch tokens; the tower is frozen (iBOT)."""

    def __init__(self, config, classes):
        super().__init__()
        self.config = config
        self.visual = models.ViT(config).requires_grad_(False)
        self.conv_seg = nn.Conv2d(config.width, classes, 1)

    def init_head(self, trained):
        """mmsegmentation: normal, std .01."""
        nn.init.normal_(self.conv_seg.weight, std=0.01)

    def forward(self, images):
        """(B, 3, S, S) normalised -> (B, C, S, S)."""
        self.visual.eval()  # frozen: no stochastic depth either
        with torch.no_grad():
            x = as_map(self.visual(images), self.config.grid)
        return resized(self.conv_seg(x), images.shape[2:])


def as_map(tokens, side):
    """Class token and patches (B, 1 + N, D) -> (B, D, side, side)."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))


HEADS = dict(upernet=UPerNet, linear=Linear)


# ---------------------------------------------------------------- pictures with labels

class LabelledPixels(torch.utils.data.Dataset):
    """(epoch, index) -> images (S, S, 3) uint8, labels (S, S): drawn from (seed, epoch, index)."""

    def __init__(self, tests, config, size):
        self.tests, self.config, self.size = tests, config, size

    def __getitem__(self, key):
        rng, size = np.random.default_rng([self.config.seed, *key]), self.size
        image, label = self.tests.load(key[1])
        image, label = rescaled(image, label, size, rng.uniform(0.5, 2.0))
        image, label = random_crop(image, label, size, rng)
        if rng.random() < 0.5:
            image, label = ImageOps.mirror(image), ImageOps.mirror(label)
        return dict(images=torch.from_numpy(np.array(recoloured(image, rng))),
                    labels=torch.from_numpy(np.array(label)).long())


def rescaled(image, label, size, ratio):
    """The shorter side `ratio` times `size`, but the longer at most four times that (mmsegmentation's (2048, 512))."""
    short, long = sorted(image.size)
    factor = min(ratio * size / short, 4 * ratio * size / long)
    shape = [max(1, round(side * factor)) for side in image.size]
    return image.resize(shape, Image.BILINEAR), label and label.resize(shape, Image.NEAREST)


def random_crop(image, label, size, rng, largest=0.75):
    """A square of which no class covers more than `largest`, in ten tries; what is missing is filled and left out."""
    for _ in range(11):  # mmsegmentation: the first, and ten more
        x, y = (int(rng.integers(max(side - size, 0) + 1)) for side in image.size)
        part = label.crop((x, y, min(x + size, image.width), min(y + size, image.height)))
        counts = np.bincount(np.asarray(part).ravel(), minlength=256)[:IGNORE]
        if (counts > 0).sum() > 1 and counts.max() < largest * counts.sum():
            break
    whole, labels = Image.new("RGB", (size, size), finetune.FILL["fillcolor"]), Image.new("L", (size, size), IGNORE)
    whole.paste(image.crop((x, y, min(x + size, image.width), min(y + size, image.height))))
    labels.paste(part)
    return whole, labels


def recoloured(image, rng):
    """Photometric distortion (SSD, mmsegmentation): each half of the time brightness, contrast, saturation, hue.

    Contrast comes second or last.
    """
    def contrast(image):
        if rng.random() < 0.5:
            gain = rng.uniform(0.5, 1.5)
            return image.point([min(255, int(gain * x)) for x in range(256)] * 3)
        return image
    early = rng.random() < 0.5
    if rng.random() < 0.5:
        shift = rng.uniform(-32, 32)
        image = image.point([min(255, max(0, int(x + shift))) for x in range(256)] * 3)
    image = contrast(image) if early else image
    hue, saturation, value = image.convert("HSV").split()
    if rng.random() < 0.5:
        gain = rng.uniform(0.5, 1.5)
        saturation = saturation.point([min(255, int(gain * x)) for x in range(256)])
    if rng.random() < 0.5:
        turn = int(rng.integers(-26, 27))  # 18 of 180
        hue = hue.point([(x + turn) % 256 for x in range(256)])
    image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image if early else contrast(image)


# ---------------------------------------------------------------- the run

def slide(model, images, size, stride):
    """Logits of a picture of any size from windows; where they overlap, their mean (mmsegmentation's slide inference).

    images (1, 3, H, W) -> (1, C, H, W).  What is smaller than a window is filled up to it meanwhile.
    """
    height, width = images.shape[2:]
    images = F.pad(images, (0, max(0, size - width), 0, max(0, size - height)))
    tops, lefts = (sorted({min(start, side - size) for start in range(0, max(side - size, 0) + stride, stride)})
                   for side in images.shape[2:])
    total = count = 0
    for top in tops:
        for left in lefts:
            window = model(images[..., top:top + size, left:left + size]).float()
            around = (left, images.size(3) - left - size, top, images.size(2) - top - size)
            total, count = total + F.pad(window, around), count + F.pad(torch.ones_like(window[:, :1]), around)
    return (total / count)[..., :height, :width]


@dataclass
class Segmentation(finetune.Tuning):
    """Training of a model of HEADS; sets are data.SegmentationSets."""
    task = "segment"

    def classes(self):
        """What the head's outputs stand for."""
        return self.sets[0].names

    def samples(self):
        """The training pictures by (epoch, index)."""
        return LabelledPixels(self.sets[0], self.config, self.model.config.image_size)

    def terms(self, batch, rng):
        """Means over all pixels, those that are left out too, as mmsegmentation's: DDP then averages what is equal."""
        with self.amp:
            logits = self.student(data.normalize(batch["images"]))
        logits, auxiliary = logits if isinstance(logits, tuple) else (logits, None)
        labels = batch["labels"]                                                                     # (B, S, S)

        def mean(x):
            return F.cross_entropy(resized(x.float(), labels.shape[1:]), labels, ignore_index=IGNORE,
                                   reduction="sum") / labels.numel()
        terms = dict(loss=mean(logits))
        return terms if auxiliary is None else terms | dict(auxiliary=0.4 * mean(auxiliary))         # .4: BEiT

    def schedule(self):
        """Linear warm-up, then linear to 0 (mmsegmentation's poly of power 1)."""
        warmup = self.config.warmup_epochs * self.per_epoch
        return self.config.lr * min((self.step + 1) / (warmup + 1), 1 - self.step / self.total)

    @torch.no_grad()
    def guess(self, model, image):
        """The class of each pixel of a picture: the shorter side at the crop's size, slide, resized.  -> (H, W) long"""
        size = model.config.image_size
        pixels = torch.from_numpy(np.array(rescaled(image, None, size, 1.0)[0]))[None].to(self.place.device)
        with self.amp:
            logits = slide(model, data.normalize(pixels), size, size * 341 // 512)
        return resized(logits, image.size[::-1])[0].argmax(0).cpu()

    def draw(self, results):
        """predictions.png: test pictures, their labels, and what the model says."""
        model, tests = (self.teacher or self.model).eval(), self.sets[1]
        examples = [(tests.pictures[i].name, image, np.array(label), self.guess(model, image).numpy())
                    for i, (image, label) in ((i, tests.load(i)) for i in evaluate.evenly(len(tests.pictures), 6))]
        mean = results[self.task]["scores"]["mIoU"]
        title = f"{Path(tests.name).name}: mIoU {100 * mean:.1f} on {len(tests.pictures):,} test pictures such as"
        pictures.save(pictures.label_sheet(title, examples, tests.names), Path(self.config.out) / "predictions.png")

    def measure(self, model):
        """mIoU and pixel accuracy on the test set, each picture at its own size."""
        tests, classes = self.sets[1], len(self.sets[1].names)

        def counted(numbers):
            confusion = torch.zeros(classes, classes, dtype=torch.long)
            for i in tqdm(numbers, "pictures", disable=evaluate.quiet(), leave=False):
                image, label = tests.load(i)
                confusion += evaluate.confusion_matrix(self.guess(model, image), torch.from_numpy(np.array(label)),
                                                       classes)
            return confusion
        mine = evaluate.together(lambda: counted(range(self.place.rank, len(tests.pictures), self.place.world)))
        confusion = losses.all_sum(mine.to(self.place.device)).cpu()
        return dict(scores=evaluate.segmentation_scores(confusion), chance=1 / (2 * classes - 1), remarks=tests.remarks,
                    over=f"{len(tests.pictures):,} pictures, {classes} classes, {self.size:,} to train",
                    protocol=dict(place=str(tests.place), pictures=len(tests.pictures), classes=classes)
                    | self.protocol())


def open_run(config, place):
    """Everything that the loop needs, from the last checkpoint where there is one.

    Raises ValueError where the settings, the data or the disk do not allow it.
    """
    sets = place.after_first(lambda: [data.segmentation_set(config.data, config.root, split)
                                      for split in ("train", "test")])
    alone = min(config.batch_size, len(sets[0].pictures)) // (1 if place.device.type == "cuda" else place.world)
    if config.head == "upernet" and alone < 2:
        raise ValueError("--head upernet normalises over a batch, on CPUs each rank's own: of one picture there is no "
                         "deviation; give a larger --batch-size")

    def model_of(shape):
        model = HEADS[config.head](shape, len(sets[0].names))
        several = place.device.type == "cuda" and place.world > 1  # on CPUs each rank has statistics of its own
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if several else model
    return finetune.open_tuning(Segmentation, config, place, sets, sets[0].names, model_of)


if __name__ == "__main__":
    train.main(parse, open_run, "segment.py")
