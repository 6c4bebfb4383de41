"""Semantic segmentation: UPerNet on ADE20K (paper: 50.5 mIoU), or a linear head on frozen features.

    python downstream/segment.py --data ade20k --checkpoint runs/yfcc15m-maskclip/last.pt
    python downstream/segment.py --data demo --head linear      # or FOLDER/{images,labels}

The loop is `train`.  Ideas: UPerNet (Xiao et al. 2018) on a ViT as BEiT has it, in mmsegmentation's
form and names, so that its weights load here.  The recipe is mmsegmentation's for MAE; the linear
head is iBOT's.
"""
import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluate
import losses
import model as models
from downstream import finetune
from support import testsets
from support.checkpoints import Progress, open_log, restore
from support.runtime import (Meter, SignalHandler, autocast, clip_gradients, init_distributed,
                             print0, rank0_first, run_program)
from support.settings import flag, parse_flags
from train import check_health, epoch_at, evaluation_due

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


def recipe(width, given):
    """What the tower's width and --head change in the defaults."""
    changes = {}
    if width == 128:  # our choice, for a laptop: 64 pixels, a few hundred pictures
        changes = dict(image_size=64, epochs=30, lr=1e-3, warmup_epochs=1.0, layer_decay=0.75,
                       drop_path=0.0)
    if given.get("head") == "linear":
        changes |= dict(lr=8e-4, drop_path=0.0)  # iBOT
    return changes


# ---------------------------------------------------------------- the networks

class ConvModule(nn.Sequential):
    """Convolution, batch norm, ReLU; mmsegmentation's names."""

    def __init__(self, width, channels, size):
        super().__init__()
        self.conv = nn.Conv2d(width, channels, size, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.activate = nn.ReLU()


def resized(x, size):
    """(B, C, h, w) -> (B, C, *size), bilinear."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """Four maps of one ViT's scale -> scales 4, 2, 1, 1/2  (BEiT)."""

    def __init__(self, width):
        super().__init__()
        self.upsample_4x = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, 2), nn.BatchNorm2d(width), nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, 2))
        self.upsample_2x = nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2))

    def forward(self, maps):
        """Four (B, D, g, g) -> (B, D, 4g, 4g), (B, D, 2g, 2g), (B, D, g, g), (B, D, g/2, g/2)"""
        return [self.upsample_4x(maps[0]), self.upsample_2x(maps[1]), maps[2],
                F.max_pool2d(maps[3], 2, 2)]


class UPerHead(nn.Module):
    """Pyramid pooling on the smallest map, a feature pyramid, then all four scales together."""

    def __init__(self, width, n_classes, channels, pools=(1, 2, 3, 6)):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(pool), ConvModule(width, channels, 1))
            for pool in pools)
        self.bottleneck = ConvModule(width + len(pools) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvModule(4 * channels, channels, 3)
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


class FCNHead(nn.Module):
    """One convolution and a classifier: the auxiliary head."""

    def __init__(self, width, n_classes, channels):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(width, channels, 3))
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, n_classes, 1)

    def forward(self, x):
        """(B, D, h, w) -> (B, C, h, w)."""
        return self.conv_seg(self.dropout(self.convs(x)))


class UPerNet(nn.Module):
    """An image tower, a pyramid of four of its blocks, a head, one more on the third map."""

    def __init__(self, config, n_classes):
        super().__init__()
        self.config = config
        self.visual = models.ViT(config)
        self.visual.norm.requires_grad_(False)  # not used: maps are of the residual stream (BEiT)
        n = config.depth
        self.layers = [max(1, n // 3), max(1, n // 2), max(1, 2 * n // 3), n]   # BEiT: 4, 6, 8, 12
        self.neck = Pyramid(config.width)
        self.decode_head = UPerHead(config.width, n_classes, config.width)      # 768 in ViT-B
        self.auxiliary_head = FCNHead(config.width, n_classes, config.width // 3)  # 256
        models.init_weights(self)
        nn.init.normal_(self.decode_head.conv_seg.weight, std=0.01)             # mmsegmentation
        nn.init.normal_(self.auxiliary_head.conv_seg.weight, std=0.01)

    def forward(self, images):
        """(B, 3, S, S) normalised -> (B, C, S, S); in training also the auxiliary (B, C, g, g)."""
        x = self.visual.embed(images)                                           # (B, 1 + N, D)
        outputs = []
        for block in self.visual.blocks:
            x = block(x)
            outputs.append(as_map(x, self.config.grid))
        maps = self.neck([outputs[number - 1] for number in self.layers])
        logits = resized(self.decode_head(maps), images.shape[2:])
        return (logits, self.auxiliary_head(maps[2])) if self.training else logits


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
        """(B, 3, S, S) normalised -> (B, C, S, S); in training also None, for no auxiliary head."""
        x = as_map(self.visual(images), self.config.grid)                       # (B, D, g, g)
        logits = resized(self.conv_seg(x), images.shape[2:])
        return (logits, None) if self.training else logits


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
        image, label = rescaled(image, label, self.size, rng.uniform(0.5, 2.0))  # mmsegmentation
        image, label = random_crop(image, label, self.size, rng)
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
            label = ImageOps.mirror(label)
        image = recoloured(image, rng)
        return dict(images=torch.from_numpy(np.array(image)),
                    labels=torch.from_numpy(np.array(label)).long())


def rescaled(image, label, size, ratio):
    """The shorter side becomes ratio * size, the longer at most 4 x that (mmsegmentation)."""
    short, long = sorted(image.size)
    factor = min(ratio * size / short, 4 * ratio * size / long)
    shape = [max(1, round(side * factor)) for side in image.size]
    image = image.resize(shape, Image.BILINEAR)
    return image, label.resize(shape, Image.NEAREST) if label else None


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
        image = _contrasted(image, rng)
    hue, saturation, value = image.convert("HSV").split()
    if rng.random() < 0.5:
        gain = rng.uniform(0.5, 1.5)
        saturation = saturation.point([min(255, int(gain * x)) for x in range(256)])
    if rng.random() < 0.5:
        turn = int(rng.integers(-26, 27))  # of 256; 18 of 180
        hue = hue.point([(x + turn) % 256 for x in range(256)])
    image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image if contrast_early else _contrasted(image, rng)


def _contrasted(image, rng):
    if rng.random() < 0.5:
        gain = rng.uniform(0.5, 1.5)
        return image.point([min(255, int(gain * x)) for x in range(256)] * 3)
    return image


# ---------------------------------------------------------------- the loop and the evaluation

def poly_rate(step, config, steps_per_epoch, last_step):
    """Linear warm-up, then linear to 0 (mmsegmentation's poly of power 1)."""
    warmup = config.warmup_epochs * steps_per_epoch
    return config.lr * min((step + 1) / (warmup + 1), 1 - step / last_step)


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
    device = ranks.device
    train_set, test_set = rank0_first(lambda: [
        testsets.segmentation_set(config.data, config.root, split) for split in ("train", "test")],
        ranks)
    n = len(train_set.pictures)
    classes = train_set.names
    saved, source, facts = finetune.open_run(config, ranks, train_set.pictures, classes, classes)
    model = finetune.make_model(config, saved, lambda shape: HEADS[config.head](
        shape, len(classes))).to(device)
    if device.type == "cuda" and ranks.world_size > 1:  # on CPUs each rank normalises its share
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.AdamW(finetune.parameter_groups(model, config), config.lr,
                                  (0.9, 0.999), eps=1e-8, fused=True)
    amp, scaler, _ = autocast(config.precision, device)
    stateful = dict(model=model, optimizer=optimizer, scaler=scaler)
    progress = Progress(torch.zeros((), device=device), torch.zeros((), device=device))
    if saved:
        restore(saved, stateful, progress, ranks)
    network = DistributedDataParallel(model) if ranks.world_size > 1 else model
    facts["model_config"] = dataclasses.asdict(model.config)
    steps_per_epoch = n / config.batch_size
    last_step = config.epochs * n // config.batch_size
    stop_at = min(last_step, config.steps or last_step)
    samples = LabelledPixels(train_set, config, model.config.image_size)
    batches = iter(data.make_loader(samples, [n], config.seed, config.batch_size, progress.step,
                                    stop_at, ranks, config.workers))
    log = open_log(config.out, stateful, progress, facts, source) if ranks.rank == 0 else None
    signals = SignalHandler(ranks)
    bar = tqdm(total=stop_at, initial=progress.step, desc=Path(config.out).name, unit="step",
               mininterval=1, disable=None if ranks.rank == 0 else True)  # on a terminal only
    meter = Meter(config.batch_size, progress.step)
    results, stop, saved_at = {}, False, time.time()

    while progress.step < stop_at and not stop:
        lr = poly_rate(progress.step, config, steps_per_epoch, last_step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        batch = meter.next(batches)
        labels = batch["labels"].to(device, non_blocking=True)                  # (B, S, S)
        images = data.normalize(batch["images"].to(device, non_blocking=True))  # (B, 3, S, S)
        finetune.step_rng(config, progress.step, ranks.rank)  # stochastic depth, dropout

        model.train()
        with amp:
            logits, auxiliary = network(images)                 # (B, C, S, S); (B, C, g, g) or None
        terms = dict(loss=pixel_loss(logits, labels))
        if auxiliary is not None:
            terms["auxiliary"] = 0.4 * pixel_loss(auxiliary, labels)            # BEiT
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(sum(terms.values())).backward()

        # DDP has averaged the gradient, so a NaN of one rank is seen by all.  In such a step
        # found_inf makes the fused AdamW keep weights and moments.
        scaler.unscale_(optimizer)
        norm = clip_gradients(model)
        finite = norm.isfinite()
        optimizer.found_inf = (~finite).float()
        scaler.step(optimizer)
        scaler.update()
        progress.count(finite)
        bar.update()

        stop = signals.stop_requested()
        epoch, epoch_ends = epoch_at(progress.step, last_step, n, config)
        must = stop or progress.step == stop_at
        if progress.step % config.log_every == 0 or epoch_ends or must:  # the device is waited for
            values = {name: losses.all_sum(term).item() / ranks.world_size
                      for name, term in terms.items()}
            check_health(config, progress, values, bad=0)
            record = dict(step=progress.step, epoch=progress.step / steps_per_epoch, **values,
                          lr=lr, grad_norm=norm.item(), skipped=int(progress.skipped),
                          loss_scale=scaler.get_scale(), **meter.read())
            due = epoch_ends and evaluation_due(epoch, config)
            results = dict(segment=measure(model, test_set, amp)) if due else {}
            if log:
                log.write(record | evaluate.main_scores(results))
            meter.restart(bar, values)
            if epoch_ends or must or time.time() - saved_at > finetune.SAVE_SECONDS:
                ended = epoch if epoch_ends else 0
                finetune.save(config, stateful, progress, facts, results, ended, log, must)
                saved_at = time.time()

    signals.restore()
    bar.close()
    if progress.step == last_step:
        result = results.get("segment") or measure(model, test_set, amp)
        finetune.finish(config, model, f"segment {test_set.name}", result, log)
    else:
        print0(f"{signals.name or 'a signal or --steps'}: stopped after step {progress.step} of "
               f"{last_step}; the same command without --steps resumes")
    if log:
        log.close()


def slide(model, images, size, stride):
    """(1, 3, H, W) -> logits (1, C, H, W), the mean over windows (mmsegmentation).

    A picture smaller than a window is padded meanwhile.
    """
    height, width = images.shape[2:]
    images = F.pad(images, (0, max(0, size - width), 0, max(0, size - height)))
    total = count = 0
    for top in window_starts(images.size(2), size, stride):
        for left in window_starts(images.size(3), size, stride):
            window = model(images[..., top:top + size, left:left + size]).float()
            margins = (left, images.size(3) - left - size, top, images.size(2) - top - size)
            total = total + F.pad(window, margins)
            count = count + F.pad(torch.ones_like(window[:, :1]), margins)
    return (total / count)[..., :height, :width]


def window_starts(side, size, stride):
    """Where windows of `size` begin on a side; the last one ends with it."""
    return sorted({min(start, side - size) for start in range(0, side - size + stride, stride)})


@torch.no_grad()
def predict(model, image, amp):
    """The class of each pixel of a picture (H, W), its shorter side brought to the crops' size."""
    size = model.config.image_size
    small, _ = rescaled(image, None, size, 1.0)
    pixels = torch.from_numpy(np.array(small))[None].to(evaluate.device_of(model))  # (1, h, w, 3)
    with amp:
        logits = slide(model, data.normalize(pixels), size, size * 341 // 512)  # mmsegmentation
    return resized(logits, image.size[::-1])[0].argmax(0).cpu()


def measure(model, test_set, amp):
    """mIoU and pixel accuracy of pictures at their original sizes."""
    model.eval()
    n = len(test_set.pictures)
    n_classes = len(test_set.names)
    rank, world_size = evaluate.rank_and_world()
    if world_size > 1:
        for x in model.buffers():  # batch norm's: each CPU rank has its own, rank 0's are saved
            dist.broadcast(x, 0)

    def count():
        confusion = torch.zeros(n_classes, n_classes, dtype=torch.long)
        for i in evaluate.progress(range(rank, n, world_size), "pictures"):
            image, label = test_set.load(i)
            label = torch.from_numpy(np.array(label))
            confusion += evaluate.confusion_matrix(predict(model, image, amp), label, n_classes)
        return confusion
    confusion = evaluate.together(count)  # an error on one rank is raised on all
    confusion = losses.all_sum(confusion.to(evaluate.device_of(model))).cpu()
    return dict(scores=evaluate.segmentation_scores(confusion), chance=1 / (2 * n_classes - 1),
                over=f"{n:,} pictures, {n_classes} classes",
                protocol=dict(set=test_set.name, path=str(test_set.path), pictures=n,
                              classes=n_classes))


def command_line(argv=None):
    """The command line -> SegmentConfig."""
    about = " --head linear and the demo's small tower have a recipe of their own."
    given = parse_flags(SegmentConfig, __doc__.splitlines()[0] + about, argv)
    head = given.get("head", SegmentConfig.head)
    return finetune.make_config(given, SegmentConfig, recipe, f"runs/segment/{{}}-{head}",
                                dict(head=HEADS))


def main():
    """The command line."""
    run_program("segment.py", lambda: train(command_line()))


if __name__ == "__main__":
    main()
