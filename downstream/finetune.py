"""Train an image tower further on labelled pictures: fine-tuning (paper: 83.6), or a linear probe.

    python downstream/finetune.py --data imagenet --checkpoint runs/yfcc15m-maskclip/last.pt
    python downstream/finetune.py --data FOLDER --linear       # FOLDER/{train,test}/CLASS/*.jpg
    python downstream/finetune.py --data imagenet --scratch    # DeiT: the same from random weights

Fine-tuning has SLIP's recipe, which is BEiT's; --linear trains a head on the frozen tower by MoCo
v3's.  The loop is `train`.  Ideas: BEiT (learning rates by layer), timm (RandAugment, erasing,
mixup; the tests compare).
"""
import dataclasses
import math
import os
import sys
import time
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluate
import losses
import model as models
from support import testsets
from support.checkpoints import (Progress, check_ranks_agree, check_same_run, checkpoint_state,
                                 find_checkpoint, open_log, prune_checkpoints, restore, try_save)
from support.runtime import (Meter, SignalHandler, autocast, clip_gradients, init_distributed,
                             print0, rank0_first, run_program)
from support.settings import check_ranges, flag, parse_flags
from support.weights import read_weights
from train import check_health, data_label, epoch_at, evaluation_due, learning_rate


@dataclass
class TowerConfig:
    """Settings of a run that starts from an image tower, here and in segment.py."""
    checkpoint: str = flag("", "weights to start from, any that evaluate.py reads; else the newest")
    scratch: bool = flag(False, "start from random weights of --model instead (DeiT)")
    model: str = flag("vit_b16", f"for --scratch: {', '.join(models.PRESETS)}")
    layer_decay: float = flag(0.65, "learning rate of a block as a share of the next one's")
    drop_path: float = flag(0.1, "stochastic depth of the last block, linear from 0 at the first")
    weight_decay: float = 0.05      # BEiT, mmsegmentation
    seed: int = flag(0, "of the head, the order and all that is done to pictures")
    precision: str = flag("auto", "fp32, or autocast to bf16 or fp16; auto: bf16 on CUDA")
    # What follows does not change what is learned.
    root: str = flag("", "folder of named data sets; else $MASKCLIP_DATA, else ./data")
    out: str = flag("", "folder of this run; else one under runs/, named by task and data")
    grad_checkpointing: bool = flag(False, "compute blocks twice: less memory")
    workers: int = flag(-1, "loader processes per rank, -1: by the number of cores")
    log_every: int = flag(10, "steps between lines of log.jsonl")
    eval_every: int = flag(0, "epochs between evaluations (best.pt is the best), 0: at the end")
    resume: str = flag("", "checkpoint to resume from; else last.pt in --out if it is there")
    force: bool = flag(False, "resume although settings or data differ")
    steps: int = flag(0, "stop after this step; the schedules stay those of --epochs")


@dataclass
class TuneConfig(TowerConfig):
    """Everything that fixes a run; saved in each checkpoint.  Defaults: SLIP's for ViT-B."""
    data: str = flag("imagenet", "imagenet, one of ICinW's, demo, or a folder of train/ and test/")
    linear: bool = flag(False, "linear probe by MoCo v3's recipe: the tower is frozen")
    image_size: int = flag(0, "pixels a side, 0: the checkpoint's; positions are resized")
    epochs: int = flag(100, "passes over the data")
    batch_size: int = flag(1024, "GLOBAL batch in pictures, whatever the number of GPUs")
    lr: float = flag(4e-3, "peak learning rate of the head; with --linear 0 is 3 x batch / 256")
    warmup_epochs: float = flag(20.0, "epochs of linear warm-up from 1e-6")
    crop_min: float = 0.08      # smallest share of the picture in a random crop
    magnitude: float = 9.0      # of RandAugment's two operations (of 10; deviation 0.5), 0: none
    erase: float = 0.25         # share of the pictures in which a rectangle becomes noise
    mixup: float = 0.8          # mixup's alpha, for half of the batches; 0: no mixtures at all
    cutmix: float = 1.0         # cutmix's, for the other half
    smoothing: float = 0.1      # of the labels


# Settings that may differ when a run resumes; the data may move, its fingerprint is compared.
MAY_DIFFER = ("data", "root", "out", "grad_checkpointing", "workers", "log_every", "eval_every",
              "resume", "force", "steps")
# Settings that a run keeps even with --force.
FIXED = ("checkpoint", "scratch", "model", "linear", "head", "image_size", "batch_size")
SAVE_SECONDS = 1200  # our choice: between checkpoints, in addition to one at the end of an epoch

# Our choice, for a laptop: 64 pixels, a few thousand pictures, to which less is done.
TINY = dict(epochs=10, batch_size=64, lr=2e-3, warmup_epochs=1.0, layer_decay=0.5, drop_path=0.0,
            crop_min=0.5, magnitude=5.0, erase=0.0, mixup=0.0)
SCRATCH = dict(lr=1e-3, layer_decay=1.0)                            # DeiT, of any size ...
DEIT = SCRATCH | dict(epochs=300, warmup_epochs=5.0)                # ... and as published
LINEAR = dict(epochs=90, batch_size=1024, lr=0.0, warmup_epochs=0.0, layer_decay=1.0,
              weight_decay=0.0, drop_path=0.0, magnitude=0.0, erase=0.0, mixup=0.0,
              smoothing=0.0, precision="fp32")                      # MoCo v3
WIDTHS = {
    128: TINY,
    384: dict(drop_path=0.0),                                       # SLIP, ViT-S
    1024: dict(epochs=50, warmup_epochs=5.0, layer_decay=0.75),     # SLIP, ViT-L
}


def recipe(width, given):
    """What the tower's width, --scratch and --linear change in the defaults."""
    if given.get("linear"):
        return LINEAR
    if given.get("scratch"):
        return TINY | SCRATCH if width == 128 else DEIT
    return WIDTHS.get(width, {})


def make_config(given, config_class, recipe_of, folder, choices):
    """Defaults, then recipe_of(width of the tower, given), then what was given.

    folder: of the run without --out; {} is the data's name.  A run that exists there says itself
    what it started from.  Raises ValueError or FileNotFoundError.
    """
    choices = choices | dict(model=models.PRESETS)
    draft = config_class(**given)
    check_ranges(draft, choices, [])
    if ("checkpoint" if draft.scratch else "model") in given:
        raise ValueError("--model is for --scratch, which takes no --checkpoint")
    folder = folder.format(data_label([draft.data])) + ("-scratch" if draft.scratch else "")
    root = draft.root or os.environ.get("MASKCLIP_DATA", "data")
    given = given | dict(out=draft.out or folder, root=root)
    saved, _ = find_checkpoint(given["out"], draft.resume, draft.force)
    if draft.scratch:
        width = models.PRESETS[draft.model].width
    elif saved and "model_config" in saved:
        width = saved["model_config"]["width"]
        given = dict(checkpoint=saved["config"].get("checkpoint", "")) | given
    else:
        given["checkpoint"] = given.get("checkpoint") or str(evaluate.newest_checkpoint())
        width = read_weights(given["checkpoint"])["config"].width
    config = config_class(**recipe_of(width, given) | given)
    check_ranges(config, choices, [(0, 1, ("layer_decay", "drop_path")),
                                   (0, math.inf, ("image_size",)),
                                   (0, config.epochs, ("warmup_epochs",))])
    return config


# ---------------------------------------------------------------- the model, rates of its layers

def resized_positions(positions, side):
    """Positions (1, 1 + n * n, D) of class token and grid -> (1, 1 + side * side, D), as BEiT."""
    n = math.isqrt(positions.size(1) - 1)
    if n == side:
        return positions
    grid = positions[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)                # (1, D, n, n)
    grid = F.interpolate(grid.float(), (side, side), mode="bicubic", align_corners=False)
    grid = grid.flatten(2).transpose(1, 2).to(positions)                            # (1, side^2, D)
    return torch.cat([positions[:, :1], grid], 1)


class Classifier(nn.Module):
    """An image tower and a linear head on its class token; frozen: the tower does not learn."""

    def __init__(self, config, n_classes, frozen=False, head_std=0.02):
        super().__init__()
        self.config = config
        self.visual = models.ViT(config).requires_grad_(not frozen)
        self.head = nn.Linear(config.width, n_classes)
        models.init_weights(self)
        if frozen:
            nn.init.normal_(self.head.weight, std=0.01)  # MoCo v3
        else:
            nn.init.trunc_normal_(self.head.weight, std=head_std)

    def forward(self, images):
        """(B, 3, H, W) normalised -> (B, C)."""
        return self.head(self.visual(images, rows=slice(1))[:, 0])


def make_model(config, saved, make_network):
    """make_network(ModelConfig), with the image tower of --checkpoint unless --scratch.

    saved: a checkpoint of this run, which says the shapes; the caller loads its weights.
    Raises FileNotFoundError or ValueError.
    """
    torch.manual_seed(config.seed)
    tower = {}
    if saved:
        shape = models.ModelConfig(**saved["model_config"])
    elif config.scratch:
        shape = dataclasses.replace(models.PRESETS[config.model], method="deit")
    else:
        weights = read_weights(config.checkpoint)
        shape = weights["config"]
        tower = {name.removeprefix("visual."): x for name, x in weights["model"].items()
                 if name.startswith("visual.")}
    shape = dataclasses.replace(shape, image_size=config.image_size or shape.image_size)
    if shape.image_size % shape.patch_size:
        raise ValueError(f"--image-size {shape.image_size} is not a multiple of the tower's "
                         f"patches of {shape.patch_size}")
    model = make_network(shape)
    if tower:
        tower["pos_embed"] = resized_positions(tower["pos_embed"], shape.grid)
        model.visual.load_state_dict(tower)
    models.set_up_blocks(model, config.grad_checkpointing, compile=False)
    rates = torch.linspace(0, config.drop_path, shape.depth).tolist()  # timm: linear over blocks
    for block, rate in zip(model.visual.blocks, rates):
        block.drop_path = rate
    return model


def parameter_groups(model, config):
    """Parameters by layer and kind; "scale" is a group's share of the learning rate (BEiT).

    Layer 0 holds class token, positions and patches, layer i + 1 block i, the last layer all else;
    layer l of n learns at layer_decay ** (n - l).  Biases, norms, class token and positions have no
    weight decay.
    """
    groups = {}
    last = len(model.visual.blocks) + 1
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        part = name.split(".")
        layer = last
        if part[0] == "visual" and part[1] != "norm":
            layer = 1 + int(part[2]) if part[1] == "blocks" else 0
        decays = p.ndim >= 2 and part[-1] not in ("cls_token", "pos_embed")
        group = groups.setdefault((layer, decays), dict(params=[]))
        group["scale"] = config.layer_decay ** (last - layer)
        group["weight_decay"] = config.weight_decay if decays else 0.0
        group["params"].append(p)
    return list(groups.values())


def make_optimizer(model, config):
    """BEiT's AdamW, with --linear MoCo v3's SGD.  Fused, because these honour .found_inf."""
    groups = parameter_groups(model, config)
    if not config.linear:
        return torch.optim.AdamW(groups, config.lr, (0.9, 0.999), eps=1e-8, fused=True)
    optimizer = torch.optim.SGD(groups, config.lr, momentum=0.9, fused=True)
    for p in model.head.parameters():  # without this, a skipped first step leaves it undefined
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def probe_rate(step, config, steps_per_epoch):
    """--linear: a cosine by epoch to 0, from --lr or 3 x batch / 256 (MoCo v3)."""
    peak = config.lr or 3 * config.batch_size / 256
    epoch = int(step / steps_per_epoch)
    return peak * (1 + math.cos(math.pi * epoch / config.epochs)) / 2


# ---------------------------------------------------------------- what is done to pictures, labels

MEAN_COLOUR = tuple(round(255 * x) for x in data.IMAGENET_MEAN)
FILL = dict(resample=Image.BICUBIC, fillcolor=MEAN_COLOUR)


def _signed(value, rng):
    return -value if rng.random() > 0.5 else value


def _affine(image, *matrix):
    return image.transform(image.size, Image.AFFINE, matrix, **FILL)


def _enhance(kind, image, m, rng):
    return kind(image).enhance(max(0.1, 1 + _signed(0.9 * m, rng)))


def _solarize_add(image, m, rng):
    values = [min(255, i + int(110 * m)) if i < 128 else i for i in range(256)]
    return image.point(values * 3)


# timm's fifteen operations of "inc1": (image, m in 0 .. 1, rng) -> image, stronger with m
OPERATIONS = dict(
    AutoContrast=lambda image, m, rng: ImageOps.autocontrast(image),
    Equalize=lambda image, m, rng: ImageOps.equalize(image),
    Invert=lambda image, m, rng: ImageOps.invert(image),
    Rotate=lambda image, m, rng: image.rotate(_signed(30 * m, rng), **FILL),
    Posterize=lambda image, m, rng: ImageOps.posterize(image, max(1, 4 - int(4 * m))),  # not 0
    Solarize=lambda image, m, rng: ImageOps.solarize(image, 256 - int(256 * m)),
    SolarizeAdd=_solarize_add,
    Color=partial(_enhance, ImageEnhance.Color),
    Contrast=partial(_enhance, ImageEnhance.Contrast),
    Brightness=partial(_enhance, ImageEnhance.Brightness),
    Sharpness=partial(_enhance, ImageEnhance.Sharpness),
    ShearX=lambda image, m, rng: _affine(image, 1, _signed(0.3 * m, rng), 0, 0, 1, 0),
    ShearY=lambda image, m, rng: _affine(image, 1, 0, 0, _signed(0.3 * m, rng), 1, 0),
    TranslateX=lambda image, m, rng: _affine(
        image, 1, 0, _signed(0.45 * m, rng) * image.width, 0, 1, 0),
    TranslateY=lambda image, m, rng: _affine(
        image, 1, 0, 0, 0, 1, _signed(0.45 * m, rng) * image.height),
)


def rand_augment(image, magnitude, rng):
    """timm's rand-m9-mstd0.5-inc1: two operations, each half of the time, around a magnitude."""
    for number in rng.integers(len(OPERATIONS), size=2):
        if rng.random() <= 0.5:
            m = min(max(rng.normal(magnitude, 0.5), 0.0), 10.0) / 10
            image = list(OPERATIONS.values())[number](image, m, rng)
    return image


def erased_box(height, width, rng):
    """Random erasing's rectangle (Zhong et al. 2020): 1/50 to 1/3 of the area.

    -> top, left, height, width; None if ten tries do not fit
    """
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h = round(math.sqrt(area * aspect))
        w = round(math.sqrt(area / aspect))
        if h < height and w < width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return None


@dataclass
class LabelledPictures(torch.utils.data.Dataset):
    """(epoch, index) -> images (S, S, 3) uint8, labels (), drawn from (seed, epoch, index)."""
    tests: testsets.TestSet
    config: TuneConfig
    size: int

    def __getitem__(self, key):
        config = self.config
        rng = np.random.default_rng([config.seed, *key])
        image = testsets.load_picture(self.tests.pictures[key[1]])
        box = data.crop_box(*image.size, (config.crop_min, 1.0), rng)
        resample = Image.BILINEAR if config.linear else Image.BICUBIC
        image = data.crop(image, box, self.size, resample=resample)
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
        if config.magnitude:
            image = rand_augment(image, config.magnitude, rng)
        pixels = np.array(image)
        box = erased_box(self.size, self.size, rng) if rng.random() < config.erase else None
        if box:
            top, left, h, w = box
            noise = rng.normal(data.IMAGENET_MEAN, data.IMAGENET_STD, (h, w, 3))  # timm
            pixels[top:top + h, left:left + w] = (255 * noise).round().clip(0, 255)
        return dict(images=torch.from_numpy(pixels), labels=self.tests.targets[key[1]])


def mix(images, labels, n_classes, config, rng):
    """Mix a batch with itself reversed, as timm: mixup (Zhang et al. 2018) or cutmix (Yun et al.
    2019).  Smooth the labels.

    images (B, 3, H, W), which may be changed, labels (B,) -> images, targets (B, C)
    """
    share = 1.0  # of each picture itself; its partner has the rest
    if config.mixup:
        cut = rng.random() < 0.5
        alpha = config.cutmix if cut else config.mixup
        share = rng.beta(alpha, alpha)
        if cut:
            height, width = images.shape[2:]
            y0, y1 = _interval(height, math.sqrt(1 - share), rng)
            x0, x1 = _interval(width, math.sqrt(1 - share), rng)
            images[..., y0:y1, x0:x1] = images[..., y0:y1, x0:x1].flip(0)
            share = 1 - (y1 - y0) * (x1 - x0) / (height * width)
        else:
            images = images.flip(0).lerp_(images, share)
    low = config.smoothing / n_classes
    targets = torch.full((len(labels), n_classes), low, device=images.device)
    targets.scatter_(1, labels[:, None], 1 - config.smoothing + low)
    return images, share * targets + (1 - share) * targets.flip(0)


def _interval(side, share, rng):  # around a random point, cut at the ends
    length = int(side * share)
    middle = int(rng.integers(side))
    return max(middle - length // 2, 0), min(middle + (length + 1) // 2, side)


# ---------------------------------------------------------------- a run, also of segment.py

def open_run(config, ranks, pictures, labels, classes):
    """Find the checkpoint that a run resumes from, and say what begins.

    -> the checkpoint and its path, or None, None; what all checkpoints of the run hold.
    A batch has at most all pictures.  Raises ValueError or OSError.
    """
    n = len(pictures)
    world_size = ranks.world_size
    largest = max(1, n // world_size) * world_size
    if config.batch_size > largest:
        print0(f"warning: {n} pictures are fewer than a batch of {config.batch_size}: {largest}")
        config.batch_size = largest
    if config.batch_size % world_size:
        raise ValueError(f"--batch-size {config.batch_size} is the global batch: it is not a "
                         f"multiple of {world_size} ranks")
    names = [Path(testsets.picture_name(picture)).name for picture in pictures]  # folders may move
    fingerprint = f"{n} pictures, {zlib.crc32(repr((names, labels)).encode()):08x}"
    saved, source = find_checkpoint(config.out, config.resume, config.force)
    if saved:
        check_same_run(saved, source, config, fingerprint, MAY_DIFFER, FIXED)
        if saved["classes"] != classes:
            raise ValueError(f"the classes are not those of {source}: give another --out")
    step = saved["step"] if saved else 0
    check_ranks_agree(step, fingerprint, ranks)
    made_by = [*(saved["made_by"] if saved else []), evaluate.provenance()]  # one a start
    settings = dataclasses.asdict(config)
    print0(" ".join(f"{name}={value}" for name, value in settings.items()))
    print0(f"{n:,} pictures; {n / config.batch_size:.1f} steps an epoch, on {world_size} ranks; "
           f"from step {step} of {source or config.checkpoint or 'random weights'}")
    return saved, source, dict(pairs=fingerprint, config=settings, made_by=made_by, classes=classes)


def step_rng(config, step, rank):
    """Random numbers of one step on one rank: NumPy's; PyTorch's are seeded (stochastic depth)."""
    seeds = np.random.SeedSequence([config.seed, step, rank])
    torch.manual_seed(int(seeds.generate_state(1)[0]))
    return np.random.default_rng(seeds)


def save(config, stateful, progress, facts, results, ended, log, must):
    """last.pt; epoch-N.pt if an epoch has `ended`, else 0; best.pt if a score is the highest."""
    names = [f"epoch-{ended}.pt"] if ended else []
    best = max([progress.best, *evaluate.main_scores(results).values()])
    names += ["best.pt"] if best > progress.best else []
    progress.best = best
    state = checkpoint_state(stateful, progress, 0, facts)
    if log and try_save(config.out, state, names, log, must) and ended:
        prune_checkpoints(config.out, ended, keep=2)  # our choice


def finish(config, model, task, result, log):
    """Print the scores of a complete run and append them to results.jsonl."""
    print0(evaluate.table({"": {task: result}}, [model.config.method]))
    if log:
        evaluate.append_result(Path(config.out) / "last.pt", model, task, result)


# ---------------------------------------------------------------- the loop and the evaluation

def train(config):
    """Train as the config says, from last.pt in config.out if there is one; then evaluate."""
    ranks = init_distributed()
    device = ranks.device
    train_set, test_set = rank0_first(lambda: testsets.probe_sets(config.data, config.root), ranks)
    pictures, labels = train_set.pictures, train_set.targets
    n = len(pictures)
    classes = [names[0] for names in train_set.names]
    if labels.ndim > 1:
        raise ValueError(f"{train_set.path}: pictures of several classes cannot be trained on here")
    saved, source, facts = open_run(config, ranks, pictures, labels.tolist(), classes)
    head_std = 0.02 if config.scratch else 0.02 * 0.001  # BEiT
    model = make_model(config, saved, lambda shape: Classifier(
        shape, len(classes), config.linear, head_std)).to(device)
    optimizer = make_optimizer(model, config)
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
    samples = LabelledPictures(train_set, config, model.config.image_size)
    batches = iter(data.make_loader(samples, [n], config.seed, config.batch_size, progress.step,
                                    stop_at, ranks, config.workers))
    log = open_log(config.out, stateful, progress, facts, source) if ranks.rank == 0 else None
    signals = SignalHandler(ranks)
    bar = tqdm(total=stop_at, initial=progress.step, desc=Path(config.out).name, unit="step",
               mininterval=1, disable=None if ranks.rank == 0 else True)  # on a terminal only
    meter = Meter(config.batch_size, progress.step)
    task = "linear" if config.linear else "finetune"
    results, stop, saved_at = {}, False, time.time()

    while progress.step < stop_at and not stop:
        if config.linear:
            lr = probe_rate(progress.step, config, steps_per_epoch)
        else:
            lr = learning_rate(progress.step, config, steps_per_epoch, lowest=1e-6)  # BEiT
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        batch = meter.next(batches)
        labels = batch["labels"].to(device, non_blocking=True)                  # (B,)
        images = data.normalize(batch["images"].to(device, non_blocking=True))  # (B, 3, H, W)
        rng = step_rng(config, progress.step, ranks.rank)
        images, targets = mix(images, labels, len(classes), config, rng)        # targets (B, C)

        model.train()
        with amp:
            logits = network(images)                                            # (B, C)
        loss = -(targets * logits.float().log_softmax(1)).sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()

        # DDP has averaged the gradient, so a NaN of one rank is seen by all.  In such a step
        # found_inf makes the fused optimiser keep weights and moments.
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
            values = dict(loss=losses.all_sum(loss).item() / ranks.world_size)
            check_health(config, progress, values, bad=0)
            record = dict(step=progress.step, epoch=progress.step / steps_per_epoch, **values,
                          lr=lr, grad_norm=norm.item(), skipped=int(progress.skipped),
                          loss_scale=scaler.get_scale(), **meter.read())
            due = epoch_ends and evaluation_due(epoch, config)
            results = {task: measure(model, test_set, config, amp)} if due else {}
            if log:
                log.write(record | evaluate.main_scores(results))
            meter.restart(bar, values)
            if epoch_ends or must or time.time() - saved_at > SAVE_SECONDS:
                ended = epoch if epoch_ends else 0
                save(config, stateful, progress, facts, results, ended, log, must)
                saved_at = time.time()

    signals.restore()
    bar.close()
    if progress.step == last_step:
        result = results.get(task) or measure(model, test_set, config, amp)
        finish(config, model, f"{task} {test_set.name}", result, log)
    else:
        print0(f"{signals.name or 'a signal or --steps'}: stopped after step {progress.step} of "
               f"{last_step}; the same command without --steps resumes")
    if log:
        log.close()


def measure(model, test_set, config, amp):
    """Scores of the middle of pictures whose shorter side is 256 / 224 of the model's size."""
    model.eval()
    size = model.config.image_size
    resample = Image.BILINEAR if config.linear else Image.BICUBIC  # MoCo v3; BEiT
    view = partial(data.center_crop, size=size, resample=resample, short=size * 256 // 224)
    with amp:
        logits = evaluate.encode_images(model, test_set.pictures, model, view)          # (n, C)
    metric = test_set.metric or "accuracy"
    score = testsets.METRICS[metric](logits.double().softmax(1), test_set.targets)
    return dict(scores={metric: score}, chance=evaluate.chance(test_set),
                over=f"{len(logits):,} pictures of {len(test_set.names):,} classes",
                protocol=evaluate.counts(test_set))


def command_line(argv=None):
    """The command line -> TuneConfig."""
    about = " --scratch, --linear and each size of tower have a recipe of their own."
    given = parse_flags(TuneConfig, __doc__.splitlines()[0] + about, argv)
    task = "linear" if given.get("linear") else "finetune"
    return make_config(given, TuneConfig, recipe, f"runs/{task}/{{}}", {})


def main():
    """The command line."""
    run_program("finetune.py", lambda: train(command_line()))


if __name__ == "__main__":
    main()
