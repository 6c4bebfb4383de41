"""Train an image tower further on labelled pictures: fine-tuning (paper: 83.6), or a linear probe.

    python downstream/finetune.py --data imagenet --checkpoint runs/yfcc15m-maskclip/last.pt
    python downstream/finetune.py --data FOLDER --linear       # FOLDER/{train,test}/CLASS/*.jpg
    python downstream/finetune.py --data imagenet --scratch    # DeiT: the same from random weights

Fine-tuning has SLIP's recipe, which is BEiT's; --linear trains a head on the frozen tower by MoCo
v3's.  The loop is `train`; around it, and around segment.py's, is `Run`.  Ideas: BEiT (learning
rates by layer), timm (RandAugment, erasing, mixup; the tests compare).
"""
import dataclasses
import math
import os
import sys
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluate
import model as models
from support import testsets
from support.checkpoints import (Progress, check_ranks_agree, check_same_run, checkpoint_state,
                                 find_checkpoint, open_log, prune_checkpoints, restore, try_save)
from support.runtime import (Meter, SignalHandler, autocast, init_distributed, on_rank0, print0,
                             rank0_first, run_program)
from support.settings import check_ranges, flag, parse_flags
from support.weights import read_weights, resized_positions
from train import (check_health, data_label, epoch_at, evaluation_due, learning_rate,
                   means_over_ranks, to_device)


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

    def resample(self):
        """How pictures are resized: MoCo v3's or BEiT's way."""
        return Image.BILINEAR if self.linear else Image.BICUBIC


# Settings that may differ when a run resumes; the data may move, its fingerprint is compared.
MAY_DIFFER = ("data", "root", "out", "grad_checkpointing", "workers", "log_every", "eval_every",
              "resume", "force", "steps")
# Settings that a run keeps even with --force.
FIXED = ("checkpoint", "scratch", "model", "linear", "head", "image_size", "batch_size",
         "layer_decay", "weight_decay")

# What a recipe changes in the defaults.  128 is tiny's width: our choice, for a laptop.
WIDTHS = {
    128: dict(epochs=10, batch_size=64, lr=2e-3, warmup_epochs=1.0, layer_decay=0.5, drop_path=0.0,
              crop_min=0.5, magnitude=5.0, erase=0.0, mixup=0.0),
    384: dict(drop_path=0.0),                                               # SLIP, ViT-S
    1024: dict(epochs=50, warmup_epochs=5.0, layer_decay=0.75)}             # SLIP, ViT-L
DEIT = dict(epochs=300, warmup_epochs=5.0, lr=1e-3, layer_decay=1.0)        # DeiT
LINEAR = dict(epochs=90, batch_size=1024, lr=0.0, warmup_epochs=0.0, layer_decay=1.0,
              weight_decay=0.0, drop_path=0.0, magnitude=0.0, erase=0.0, mixup=0.0,
              smoothing=0.0, precision="fp32")                              # MoCo v3


def recipe(width, given):
    """What the tower's width, --scratch and --linear change in the defaults."""
    if given.get("linear"):
        return LINEAR
    if given.get("scratch"):
        return WIDTHS[128] | dict(lr=1e-3, layer_decay=1.0) if width == 128 else DEIT
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
    given["out"] = draft.out or folder
    given["root"] = draft.root or os.environ.get("MASKCLIP_DATA", "data")
    saved, _ = find_checkpoint(given["out"], draft.resume, draft.force)
    if draft.scratch:
        width = models.PRESETS[draft.model].width
    elif saved and "model_config" in saved:
        width = saved["model_config"]["width"]
        given.setdefault("checkpoint", saved["config"].get("checkpoint", ""))
    else:
        given["checkpoint"] = draft.checkpoint or str(evaluate.newest_checkpoint())
        width = read_weights(given["checkpoint"])["config"].width
    config = config_class(**recipe_of(width, given) | given)
    check_ranges(config, choices, [(0, 1, ("layer_decay", "drop_path")),
                                   (0, math.inf, ("image_size",)),
                                   (0, config.epochs, ("warmup_epochs",))])
    return config


# ---------------------------------------------------------------- the model, rates of its layers

class Classifier(nn.Module):
    """An image tower and a linear head on its class token.  config: ModelConfig; run: TuneConfig"""

    def __init__(self, config, n_classes, run):
        super().__init__()
        self.config = config
        self.visual = models.ViT(config).requires_grad_(not run.linear)
        self.head = nn.Linear(config.width, n_classes)
        models.init_weights(self)
        if run.linear:
            nn.init.normal_(self.head.weight, std=0.01)                             # MoCo v3
        else:
            std = 0.02 if run.scratch else 0.02 * 0.001                             # BEiT
            nn.init.trunc_normal_(self.head.weight, std=std)

    def forward(self, images):
        """(B, 3, H, W) normalised -> (B, C)."""
        return self.head(self.visual(images, rows=slice(1))[:, 0])


def make_model(config, saved, make_network):
    """make_network(ModelConfig), with the image tower of --checkpoint unless --scratch.

    saved: a checkpoint of this run, which says the shapes; the caller loads its weights.
    Raises FileNotFoundError or ValueError.
    """
    torch.manual_seed(config.seed)
    weights = None
    if saved:
        shape = models.ModelConfig(**saved["model_config"])
    elif config.scratch:
        shape = dataclasses.replace(models.PRESETS[config.model], method="deit")
    else:
        weights = read_weights(config.checkpoint)
        shape = weights["config"]
        for note in weights["notes"]:
            print0(f"{config.checkpoint}: {note}")
    shape = dataclasses.replace(shape, image_size=config.image_size or shape.image_size)
    if shape.image_size % shape.patch_size:
        raise ValueError(f"--image-size {shape.image_size} is not a multiple of the tower's "
                         f"patches of {shape.patch_size}")
    model = make_network(shape)
    if weights:
        tower = {name.removeprefix("visual."): x for name, x in weights["model"].items()
                 if name.startswith("visual.")}
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
        group = groups.setdefault((layer, decays), dict(
            params=[], scale=config.layer_decay ** (last - layer),
            weight_decay=config.weight_decay if decays else 0.0))
        group["params"].append(p)
    return list(groups.values())


def adamw(model, config):
    """BEiT's and mmsegmentation's.  Fused, because that honours .found_inf."""
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, config.lr, (0.9, 0.999), eps=1e-8, fused=True)


def sgd(model, config):
    """MoCo v3's, for --linear."""
    groups = parameter_groups(model, config)
    optimizer = torch.optim.SGD(groups, config.lr, momentum=0.9, fused=True)
    for p in model.head.parameters():  # without this, a skipped first step leaves it undefined
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


# ---------------------------------------------------------------- what is done to pictures, labels

MEAN_COLOUR = tuple(round(255 * x) for x in data.IMAGENET_MEAN)
FILL = dict(resample=Image.BICUBIC, fillcolor=MEAN_COLOUR)


def _affine(image, *matrix):
    return image.transform(image.size, Image.AFFINE, matrix, **FILL)


# timm's fifteen of "inc1": (image, m from 0 to 1, signed: x -> x or -x) -> image
OPERATIONS = [
    lambda image, m, signed: ImageOps.autocontrast(image),
    lambda image, m, signed: ImageOps.equalize(image),
    lambda image, m, signed: ImageOps.invert(image),
    lambda image, m, signed: image.rotate(signed(30 * m), **FILL),
    lambda image, m, signed: ImageOps.posterize(image, max(1, 4 - int(4 * m))),  # Pillow: not 0
    lambda image, m, signed: ImageOps.solarize(image, 256 - int(256 * m)),
    lambda image, m, signed: image.point(  # brighten what is dark
        [min(255, x + int(110 * m)) if x < 128 else x for x in range(256)] * 3),
    lambda image, m, signed: ImageEnhance.Color(image).enhance(max(0.1, 1 + signed(0.9 * m))),
    lambda image, m, signed: ImageEnhance.Contrast(image).enhance(max(0.1, 1 + signed(0.9 * m))),
    lambda image, m, signed: ImageEnhance.Brightness(image).enhance(max(0.1, 1 + signed(0.9 * m))),
    lambda image, m, signed: ImageEnhance.Sharpness(image).enhance(max(0.1, 1 + signed(0.9 * m))),
    lambda image, m, signed: _affine(image, 1, signed(0.3 * m), 0, 0, 1, 0),
    lambda image, m, signed: _affine(image, 1, 0, 0, signed(0.3 * m), 1, 0),
    lambda image, m, signed: _affine(image, 1, 0, signed(0.45 * m) * image.width, 0, 1, 0),
    lambda image, m, signed: _affine(image, 1, 0, 0, 0, 1, signed(0.45 * m) * image.height)]


def rand_augment(image, magnitude, rng):
    """timm's rand-m9-mstd0.5-inc1: two operations, each half of the time, around a magnitude."""
    for number in rng.integers(len(OPERATIONS), size=2):
        if rng.random() <= 0.5:
            m = min(max(rng.normal(magnitude, 0.5), 0.0), 10.0) / 10
            image = OPERATIONS[number](image, m, lambda x: -x if rng.random() > 0.5 else x)
    return image


def erase(pixels, rng):
    """Random erasing (Zhong et al. 2020): a box of 1/50 to 1/3 of (H, W, 3) becomes noise."""
    height, width = pixels.shape[:2]
    for _ in range(10):  # a box that is too long is drawn again
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h = round(math.sqrt(area * aspect))
        w = round(math.sqrt(area / aspect))
        if h < height and w < width:
            top = int(rng.integers(height - h + 1))
            left = int(rng.integers(width - w + 1))
            noise = rng.normal(data.IMAGENET_MEAN, data.IMAGENET_STD, (h, w, 3))  # timm
            pixels[top:top + h, left:left + w] = (255 * noise).round().clip(0, 255)
            return


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
        image = data.crop(image, box, self.size, resample=config.resample())
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
        if config.magnitude:
            image = rand_augment(image, config.magnitude, rng)
        pixels = np.array(image)
        if rng.random() < config.erase:
            erase(pixels, rng)
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


# ---------------------------------------------------------------- around a loop, also segment.py's

class Run:
    """What a loop needs, here and in segment.py: model, optimiser, data, log, checkpoints."""

    def __init__(self, config, ranks, train_set, labels, make_network, make_optimizer, dataset):
        """Begin, or resume from the checkpoint that is there.  Raises ValueError or OSError.

        labels: with the pictures' names they tell whether the data is the same.
        """
        self.config = config
        self.ranks = ranks
        self.n = len(train_set.pictures)
        if config.batch_size % ranks.world_size or config.batch_size > self.n:
            raise ValueError(f"--batch-size {config.batch_size} is the global batch: give a "
                             f"multiple of {ranks.world_size} ranks, at most {self.n} pictures")
        names = [Path(testsets.picture_name(picture)).parts[-2:] for picture in train_set.pictures]
        fingerprint = f"{self.n} pictures, {zlib.crc32(repr((names, labels)).encode()):08x}"
        saved, source = find_checkpoint(config.out, config.resume, config.force)
        if saved:
            check_same_run(saved, source, config, fingerprint, MAY_DIFFER, FIXED)
            if len(saved["classes"]) != len(train_set.names):
                raise ValueError(f"{source} has {len(saved['classes'])} classes, the data has "
                                 f"{len(train_set.names)}: give another --out")
        self.model = make_model(config, saved, make_network).to(ranks.device)
        if ranks.world_size > 1 and ranks.device.type == "cuda":  # CPU ranks normalise their share
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.optimizer = make_optimizer(self.model, config)
        self.amp, self.scaler, _ = autocast(config.precision, ranks.device)
        self.stateful = dict(model=self.model, optimizer=self.optimizer, scaler=self.scaler)
        self.progress = Progress(*torch.zeros(2, device=ranks.device))
        if saved:
            restore(saved, source, self.stateful, self.progress, ranks)
        check_ranks_agree(self.progress.step, fingerprint, ranks)
        self.network = DistributedDataParallel(self.model) if ranks.world_size > 1 else self.model
        self.steps_per_epoch = self.n / config.batch_size
        self.last_step = config.epochs * self.n // config.batch_size
        self.stop_at = min(self.last_step, config.steps or self.last_step)
        self.stop = self.progress.step >= self.stop_at
        self.result = None  # of an evaluation after the last step
        samples = dataset(train_set, config, self.model.config.image_size)
        self.batches = iter(data.make_loader(
            samples, [self.n], config.seed, config.batch_size, self.progress.step, self.stop_at,
            ranks, config.workers))
        made_by = [*(saved["made_by"] if saved else []), evaluate.provenance()]  # one a start
        self.facts = dict(pairs=fingerprint, config=dataclasses.asdict(config), made_by=made_by,
                          classes=train_set.names,
                          model_config=dataclasses.asdict(self.model.config))
        print0(" ".join(f"{name}={value}" for name, value in self.facts["config"].items()))
        print0(f"{self.n:,} pictures; {self.steps_per_epoch:.1f} steps an epoch; from step "
               f"{self.progress.step} of {source or config.checkpoint or 'random weights'}")
        self.log = None
        if ranks.rank == 0:
            self.log = open_log(config.out, self.stateful, self.progress, self.facts, source)
        self.signals = SignalHandler(ranks)
        self.meter = Meter(config.batch_size, self.stop_at)

    def next_batch(self):
        """-> images (B, 3, H, W) normalised, labels (B, ...), NumPy's generator of this step

        PyTorch's is seeded too, for stochastic depth and dropout.
        """
        seeds = np.random.SeedSequence([self.config.seed, self.progress.step, self.ranks.rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        batch = to_device(self.meter.next(self.batches), self.ranks.device)
        return batch["images"], batch["labels"], np.random.default_rng(seeds)

    def log_and_save(self, terms, lr, norm, task, measure):
        """Log, evaluate and save after a step, if it is time to.

        terms: {name: ()} of the loss; norm () of the gradient; measure() -> a result of the task.
        """
        config = self.config
        progress = self.progress
        self.stop = self.signals.stop_requested() or progress.step == self.stop_at
        epoch, epoch_ends = epoch_at(progress.step, self.last_step, self.n, config)
        if not (self.stop or epoch_ends or progress.step % config.log_every == 0):
            return
        values, _ = means_over_ranks(terms, {}, progress, self.ranks)  # waits for the device
        check_health(config, progress, values, bad=0)
        record = dict(step=progress.step, epoch=progress.step / self.steps_per_epoch, **values,
                      lr=lr, grad_norm=norm.item(), skipped=int(progress.skipped),
                      loss_scale=self.scaler.get_scale(), **self.meter.read(progress.step, values))
        names = [f"epoch-{epoch}.pt"] if epoch_ends else []
        if epoch_ends and evaluation_due(epoch, config):
            result = on_rank0(measure, self.ranks)
            self.result = result if progress.step == self.last_step else None
            record |= evaluate.main_scores({task: result})
            names += ["best.pt"] if record[task] > progress.best else []
            progress.best = max(progress.best, record[task])
        if self.log:
            self.log.write(record)
            if self.stop or epoch_ends:
                state = checkpoint_state(self.stateful, progress, 0, self.facts)
                if try_save(config.out, state, names, self.log, must=self.stop) and epoch_ends:
                    prune_checkpoints(config.out, epoch, keep=2)  # our choice
        self.meter.restart()

    def finish(self, title, measure):
        """Evaluate a run that is complete, print the scores, append them to results.jsonl."""
        self.signals.restore()
        if self.progress.step < self.last_step:
            signalled = bool(self.signals.name) or self.progress.step < self.stop_at
            print0(f"{self.signals.reason(signalled)}: stopped after step {self.progress.step} of "
                   f"{self.last_step}; the same command{'' if signalled else ' without --steps'} "
                   "resumes")
        else:
            result = self.result or on_rank0(measure, self.ranks)
            print0(evaluate.table({"": {title: result}}, [self.model.config.method]))
            if self.log:
                evaluate.append_result(Path(self.config.out) / "last.pt", self.model, title, result)
        if self.log:
            self.log.close()


# ---------------------------------------------------------------- the loop and the evaluation

def train(config):
    """Train as the config says, from last.pt in config.out if there is one; then evaluate."""
    ranks = init_distributed()
    train_set, test_set = rank0_first(lambda: testsets.probe_sets(config.data, config.root), ranks)
    labels = train_set.targets
    if labels.ndim > 1:
        raise ValueError(f"{train_set.path}: pictures of several classes cannot be trained on here")
    n_classes = len(train_set.names)
    run = Run(config, ranks, train_set, labels.tolist(),
              lambda shape: Classifier(shape, n_classes, config),
              sgd if config.linear else adamw, LabelledPictures)
    optimizer = run.optimizer
    scaler = run.scaler
    task = "linear" if config.linear else "finetune"
    evaluation = partial(measure, run.model, test_set, config, run.amp)

    while not run.stop:
        step = run.progress.step
        if config.linear:  # MoCo v3: a cosine, the same for all steps of an epoch
            turn = math.pi * int(step / run.steps_per_epoch) / config.epochs
            lr = (config.lr or 3 * config.batch_size / 256) * (1 + math.cos(turn)) / 2
        else:
            lr = learning_rate(step, config, run.steps_per_epoch, lowest=1e-6)  # BEiT
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        images, labels, rng = run.next_batch()                  # (B, 3, H, W), (B,)
        images, targets = mix(images, labels, n_classes, config, rng)           # targets (B, C)
        run.model.train()
        with run.amp:
            logits = run.network(images)                                        # (B, C)
        loss = -(targets * logits.float().log_softmax(1)).sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()

        # DDP has averaged the gradient, so all ranks see the NaN of one.  In such a step found_inf
        # makes the fused optimiser keep weights and moments.
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), math.inf)
        finite = norm.isfinite()
        optimizer.found_inf = (~finite).float()
        scaler.step(optimizer)
        scaler.update()
        run.progress.count(finite)
        run.log_and_save(dict(loss=loss), lr, norm, task, evaluation)
    run.finish(f"{task} {test_set.name}", evaluation)


def measure(model, test_set, config, amp):
    """Scores of the middle of pictures whose shorter side is 256 / 224 of the model's size."""
    model.eval()
    size = model.config.image_size
    view = partial(data.center_crop, size=size, short=size * 256 // 224, resample=config.resample())
    with amp:
        logits = evaluate.encode_images(model, test_set.pictures, model, view)          # (n, C)
    metric = test_set.metric or "accuracy"
    score = testsets.METRICS[metric](logits.double().softmax(1), test_set.targets)
    return dict(scores={metric: score}, chance=evaluate.chance(test_set),
                over=f"{len(logits):,} pictures of {len(test_set.names):,} classes",
                protocol=evaluate.counts(test_set))


def command_line(argv=None):
    """The command line -> TuneConfig."""
    given = parse_flags(TuneConfig, __doc__.splitlines()[0], argv,
                        {"--linear": LINEAR, "--scratch": DEIT, "tiny": WIDTHS[128]})
    task = "linear" if given.get("linear") else "finetune"
    return make_config(given, TuneConfig, recipe, f"runs/{task}/{{}}", {})


def main():
    """The command line."""
    run_program("finetune.py", lambda: train(command_line()))


if __name__ == "__main__":
    main()
