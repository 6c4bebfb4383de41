"""End-to-end fine-tuning of an image tower on labelled pictures, by the recipe of SLIP, which is BEiT's (paper: 83.6).

    python downstream/finetune.py --data imagenet --checkpoint runs/yfcc15m-maskclip/last.pt
    torchrun --nproc_per_node=8 downstream/finetune.py --data imagenet --checkpoint ViT-B-16.pt
    python downstream/finetune.py --data FOLDER            # FOLDER/{train,test}/CLASS/*.jpg; the newest checkpoint
    python downstream/finetune.py --data imagenet --scratch                # DeiT: the same from random weights

Ideas: BEiT (layer-wise learning rates), timm (RandAugment with its ranges, mixup, random erasing; equal to them in the
tests).  The loop, checkpoints, signals and logs are train.py's.
"""
import copy
import dataclasses
import math
import sys
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the six files are
import data
import evaluate
import model as models
import train
from train import flag


@dataclass
class TowerConfig(train.LoopConfig):
    """What goes on from an image tower, here and in segment.py; the numbers are SLIP's and mmsegmentation's alike."""
    checkpoint: str = flag("", "weights to start from: all that evaluate.py reads; else the newest under runs/")
    scratch: bool = flag(False, "random weights of --model instead (DeiT)")
    model: str = flag("vit_b16", f"for --scratch: {', '.join(models.PRESETS)}")
    layer_decay: float = flag(0.65, "each block has so many times the learning rate of the one above it")
    weight_decay: float = flag(0.05, "of matrices; biases, norms, class token and positions have none")
    drop_path: float = flag(0.1, "stochastic depth of the last block; linear from 0 at the first")
    ema: float = flag(0.0, "momentum of a moving average of the weights, which is then what is evaluated; 0: none")
    seed: int = flag(0, "of head, order and what is done to pictures")
    grad_clip: float = flag(0.0, "largest norm of the gradient, 0: as it is")
    precision: str = flag("auto", "fp32, or autocast to bf16 or fp16 (loss scaled); auto: bf16 on CUDA")


@dataclass
class TuneConfig(TowerConfig):
    """Everything that fixes a run; saved in each checkpoint.  Defaults are SLIP's for ViT-B on ImageNet."""
    data: str = flag("imagenet", "imagenet, one of ICinW's, demo, or a folder with train/ and test/ class "
                      "folders")
    image_size: int = flag(0, "pixels a side, 0: the checkpoint's; positions are resized")
    epochs: int = flag(100, "passes over the data")
    batch_size: int = flag(1024, "GLOBAL batch in pictures, whatever the number of GPUs")
    lr: float = flag(4e-3, "peak learning rate of the head")
    warmup_epochs: float = flag(20.0, "epochs of linear warm-up from 1e-6")
    crop_min: float = flag(0.08, "smallest share of the picture in a random crop")
    magnitude: float = flag(9.0, "of RandAugment's two operations (of 10; deviation 0.5), 0: none of them")
    erase: float = flag(0.25, "share of the pictures of which a rectangle becomes noise")
    mixup: float = flag(0.8, "mixup's alpha, 0: none; half of the batches have this one ...")
    cutmix: float = flag(1.0, "... and half cutmix's, 0: none")
    smoothing: float = flag(0.1, "of the labels")


# What the tower changes in the recipe, by its width.
RECIPES = {
    # Our choice, for a laptop: 64 pixels, a few thousand pictures.  Less is done to small pictures, which are hard to
    # tell as they are.  Found on emoji, one vendor held out: layer decay 0.5 scores 36.6, 0.35 36.1, 0.75 33.7; lr 4e-3
    # 35.0 (five epochs).
    128: dict(epochs=10, batch_size=64, lr=2e-3, warmup_epochs=1.0, layer_decay=0.5, drop_path=0.0, crop_min=0.5,
              magnitude=5.0, erase=0.0, mixup=0.0, cutmix=0.0),
    384: dict(drop_path=0.0),                                          # SLIP
    1024: dict(epochs=50, warmup_epochs=5.0, layer_decay=0.75),        # SLIP
}
SCRATCH = dict(layer_decay=1.0, lr=1e-3)                               # DeiT: all blocks learn alike ...
DEIT = dict(epochs=300, warmup_epochs=5.0, drop_path=0.1)              # ... and long, but for the smallest
FIXED = ("checkpoint", "scratch", "model", "head", "image_size", "batch_size")  # kept even with --force: train.FIXED


def parse(argv=None):
    """The command line -> TuneConfig."""
    return resolve(train.given(TuneConfig, __doc__, argv), TuneConfig, recipe, "runs/finetune/{}",
                   (0, 1, ("erase", "smoothing")), (0.01, 1, ("crop_min",)), (0, 10, ("magnitude",)),
                   (0, math.inf, ("mixup", "cutmix")))


def recipe(shape, given):
    """What the shape of the tower and --scratch change in the defaults."""
    own = RECIPES.get(shape.width, {})
    if given.get("scratch"):
        own = own | SCRATCH | (DEIT if shape.width != 128 else {})
    return own


def resolve(given, kind, recipe, out, *ranges):
    """Settings that were given -> a config of a kind: defaults, recipe(shape, given), then what was given.

    out, ranges: as train.settled has them.  A run that is there already (--out, --resume) says what it started from.
    Raises ValueError for what cannot be, FileNotFoundError for a checkpoint that is not there.
    """
    def settled(config):
        return train.settled(config, [config.data], out + "-scratch" * config.scratch, dict(model=models.PRESETS),
                             (*ranges, (0, 1, ("layer_decay", "drop_path", "ema")),
                              (0, math.inf, ("image_size", "lr", "weight_decay", "warmup_epochs"))))
    draft = settled(kind(**given))
    if draft.scratch and "checkpoint" in given:
        raise ValueError("--scratch starts from random weights: it takes no --checkpoint")
    if "model" in given and not draft.scratch:
        raise ValueError("--model is for --scratch: a checkpoint says itself what it is")
    if draft.scratch:
        shape = models.PRESETS[draft.model]
    elif state := train.read_saved(draft.out, draft.resume)[0]:
        shape = models.ModelConfig(**state["model_config"])
        given = dict(checkpoint=state["config"].get("checkpoint", "")) | given
    else:
        given = given if "checkpoint" in given else given | dict(checkpoint=str(evaluate.newest_checkpoint()))
        shape = evaluate.read_weights(given["checkpoint"])["config"]
    config = settled(kind(**(recipe(shape, given) | given)))
    if config.warmup_epochs >= config.epochs:
        raise ValueError(f"--warmup-epochs {config.warmup_epochs} leaves nothing of --epochs {config.epochs}: give "
                         "less")
    return config


# ---------------------------------------------------------------- the model, its layers' learning rates

def resized_positions(positions, side):
    """Positions (1, 1 + n * n, D) of a class token and a grid -> (1, 1 + side * side, D), bicubic (BEiT, MAE)."""
    old = math.isqrt(positions.size(1) - 1)
    if old == side:
        return positions
    grid = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)                        # (1, D, n, n)
    grid = F.interpolate(grid.float(), (side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions)], 1)


class Classifier(nn.Module):
    """An image tower and a linear head on its class token."""

    def __init__(self, config, classes):
        super().__init__()
        self.config = config
        self.visual = models.ViT(config)
        self.head = nn.Linear(config.width, classes)

    def init_head(self, trained):
        """BEiT: on a trained tower the head begins by saying nothing."""
        nn.init.trunc_normal_(self.head.weight, std=0.02 * 0.001 if trained else 0.02)

    def forward(self, images):
        """(B, 3, H, W) normalised -> (B, C)."""
        return self.head(self.visual(images, rows=slice(1))[:, 0])


def build(config, kind, saved=None):
    """kind(ModelConfig) on --checkpoint's image tower or a fresh one; of a checkpoint of this run, not loaded yet.

    Raises FileNotFoundError or ValueError.
    """
    torch.manual_seed(config.seed)
    tower, remarks = {}, []
    if saved:
        shape = models.ModelConfig(**saved["model_config"])
    else:
        if config.scratch:
            shape = dataclasses.replace(models.PRESETS[config.model], method="deit")
        else:
            weights = evaluate.read_weights(config.checkpoint)
            shape, remarks = weights["config"], weights["remarks"]
            tower = {name.removeprefix("visual."): x for name, x in weights["model"].items()
                     if name.startswith("visual.")}
        shape = dataclasses.replace(shape, image_size=config.image_size or shape.image_size)
        if shape.image_size % shape.patch_size:
            raise ValueError(f"--image-size {shape.image_size} is no multiple of the tower's patches of "
                             f"{shape.patch_size}")
    model = kind(shape)
    models.init_weights(model)
    model.init_head(bool(tower))
    model.remarks = remarks
    if tower:
        model.visual.load_state_dict(tower | dict(pos_embed=resized_positions(tower["pos_embed"], shape.grid)))
    for block, share in zip(model.visual.blocks, torch.linspace(0, config.drop_path, shape.depth).tolist()):
        block.drop_path = share  # timm: linear over the blocks
    return model


def parameter_groups(model, config):
    """By layer and kind: each group's "scale" is its share of the learning rate (BEiT).

    Layer 0 holds class token, positions and patches, layer i + 1 block i, the last one all else; layer l of n learns at
    layer_decay ** (n - l).  Biases, norms, class token and positions do not decay.
    """
    groups, last = {}, len(model.visual.blocks) + 1
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        part = name.split(".")
        layer = last
        if part[0] == "visual" and part[1] in ("cls_token", "pos_embed", "patch_embed", "norm_pre"):
            layer = 0
        elif part[:2] == ["visual", "blocks"]:
            layer = 1 + int(part[2])
        decays = p.ndim >= 2 and part[-1] not in ("cls_token", "pos_embed")
        group = groups.setdefault((layer, decays), dict(params=[], weight_decay=config.weight_decay * decays,
                                                        scale=config.layer_decay ** (last - layer)))
        group["params"].append(p)
    return list(groups.values())


# ---------------------------------------------------------------- what is done to pictures and labels

FILL = dict(resample=Image.BICUBIC, fillcolor=tuple(round(255 * x) for x in data.IMAGENET_MEAN))


def _either(value, rng):
    """The value or its negative."""
    return -value if rng.random() > 0.5 else value


def _moved(image, *matrix):
    return image.transform(image.size, Image.AFFINE, matrix, **FILL)


def _enhanced(kind):
    return lambda image, m, rng: kind(image).enhance(max(0.1, 1 + _either(0.9 * m, rng)))


# timm's fifteen operations of "inc1", each stronger with m in 0 .. 1
OPERATIONS = dict(
    AutoContrast=lambda image, m, rng: ImageOps.autocontrast(image),
    Equalize=lambda image, m, rng: ImageOps.equalize(image),
    Invert=lambda image, m, rng: ImageOps.invert(image),
    Rotate=lambda image, m, rng: image.rotate(_either(30 * m, rng), **FILL),
    Posterize=lambda image, m, rng: ImageOps.posterize(image, max(1, 4 - int(4 * m))),  # Pillow: not 0
    Solarize=lambda image, m, rng: ImageOps.solarize(image, 256 - int(256 * m)),
    SolarizeAdd=lambda image, m, rng: image.point([min(255, i + int(110 * m)) if i < 128 else i
                                                   for i in range(256)] * 3),
    Color=_enhanced(ImageEnhance.Color), Contrast=_enhanced(ImageEnhance.Contrast),
    Brightness=_enhanced(ImageEnhance.Brightness), Sharpness=_enhanced(ImageEnhance.Sharpness),
    ShearX=lambda image, m, rng: _moved(image, 1, _either(0.3 * m, rng), 0, 0, 1, 0),
    ShearY=lambda image, m, rng: _moved(image, 1, 0, 0, _either(0.3 * m, rng), 1, 0),
    TranslateX=lambda image, m, rng: _moved(image, 1, 0, _either(0.45 * m, rng) * image.width, 0, 1, 0),
    TranslateY=lambda image, m, rng: _moved(image, 1, 0, 0, 0, 1, _either(0.45 * m, rng) * image.height))


def rand_augment(image, magnitude, rng):
    """Two operations, each half of the time, of a magnitude drawn around `magnitude` of 10: rand-m9-mstd0.5-inc1."""
    for number in rng.integers(len(OPERATIONS), size=2):
        if rng.random() <= 0.5:
            m = min(max(rng.normal(magnitude, 0.5), 0.0), 10.0) / 10
            image = list(OPERATIONS.values())[number](image, m, rng)
    return image


def erased_box(height, width, rng):
    """Random erasing's rectangle (Zhong et al. 2020): 1/50 to 1/3 of the area.  -> top, left, height, width; or None"""
    for _ in range(10):
        area, aspect = rng.uniform(0.02, 1 / 3) * height * width, math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return None


class Labelled(torch.utils.data.Dataset):
    """(epoch, index) -> images (H, W, 3) uint8, labels (): what is random is drawn from (seed, epoch, index)."""

    def __init__(self, tests, config, size):
        self.tests, self.config, self.size = tests, config, size

    def __getitem__(self, key):
        config, rng = self.config, np.random.default_rng([self.config.seed, *key])
        image = data.load_picture(self.tests.pictures[key[1]])
        image = data.crop(image, data.crop_box(*image.size, (config.crop_min, 1.0), rng), self.size,
                          resample=Image.BICUBIC)
        image = ImageOps.mirror(image) if rng.random() < 0.5 else image
        pixels = np.array(rand_augment(image, config.magnitude, rng) if config.magnitude else image)
        if rng.random() < config.erase and (box := erased_box(self.size, self.size, rng)):
            top, left, h, w = box  # noise as of normalised pixels (timm), cut at 0 and 255
            noise = rng.normal(data.IMAGENET_MEAN, data.IMAGENET_STD, (h, w, 3))
            pixels[top:top + h, left:left + w] = (255 * noise).round().clip(0, 255)
        return dict(images=torch.from_numpy(pixels), labels=self.tests.targets[key[1]])


def mix(images, labels, classes, config, rng):
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of a batch with itself reversed, as timm does; smoothing.

    images (B, 3, H, W), which may be changed, labels (B,) -> images, targets (B, C) whose rows are shares of classes
    """
    share = 1.0  # of each picture's own
    if config.mixup or config.cutmix:
        cut = config.cutmix > 0 and (config.mixup == 0 or rng.random() < 0.5)
        share = rng.beta(*[config.cutmix if cut else config.mixup] * 2)
        if cut:
            (y0, y1), (x0, x1) = (_part(side, math.sqrt(1 - share), rng) for side in images.shape[2:])
            images[..., y0:y1, x0:x1] = images[..., y0:y1, x0:x1].flip(0)
            share = 1 - (y1 - y0) * (x1 - x0) / (images.size(2) * images.size(3))
        else:
            images = images.flip(0).lerp_(images, share)
    targets = torch.full((len(labels), classes), config.smoothing / classes, device=images.device)
    targets.scatter_(1, labels[:, None], 1 - config.smoothing + config.smoothing / classes)
    return images, share * targets + (1 - share) * targets.flip(0)


def _part(side, share, rng):
    """A stretch of `share` of a side around a random place, cut at the ends.  -> first, behind the last"""
    length, middle = int(side * share), int(rng.integers(side))
    return max(middle - length // 2, 0), min(middle + (length + 1) // 2, side)


# ---------------------------------------------------------------- the run

@dataclass
class Tuning(train.Run):
    """Fine-tuning of a Classifier."""
    sets: tuple = ()    # the training and the test set, data.TestSet
    task = "finetune"

    def facts(self):
        """What a checkpoint holds of this kind of run alone."""
        return dict(classes=self.classes())

    def classes(self):
        """What the head's outputs stand for."""
        return [several[0] for several in self.sets[0].names]

    def load(self, saved):
        """Go on from what `state` gave; a moving average that it had not begins with its weights."""
        if saved["classes"] != self.classes():
            raise ValueError(f"the classes were others when {self.source} was made: give another --out")
        super().load(saved if not self.teacher else dict(teacher=saved["model"]) | saved)

    def batches(self, stop_at):
        """This rank's share of the global batches from here on."""
        self.student = DistributedDataParallel(self.model) if self.place.world > 1 else self.model
        return iter(train.loader(self, stop_at, self.samples(), [self.size]))

    def samples(self):
        """The training pictures by (epoch, index)."""
        return Labelled(self.sets[0], self.config, self.model.config.image_size)

    def terms(self, batch, rng):
        """The loss terms of a batch on the device.  -> {name: ()}, weighted"""
        images, targets = mix(data.normalize(batch["images"]), batch["labels"], len(self.sets[0].names), self.config,
                              rng)
        with self.amp:
            logits = self.student(images)
        return dict(loss=-(targets * logits.float().log_softmax(1)).sum(1).mean())

    def schedule(self):
        """The learning rate of the last layer: BEiT's, a cosine to 1e-6."""
        return train.learning_rate(self.step, self.config, self.per_epoch, lowest=1e-6)

    def advance(self, batch):
        """One step; what is drawn in it comes from (seed, step, rank).  -> what train.Pretraining.advance gives"""
        lr, seeds = self.schedule(), np.random.SeedSequence([self.config.seed, self.step, self.place.rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))  # stochastic depth
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        batch = {name: x.to(self.place.device, non_blocking=True) for name, x in batch.items()}
        terms = self.terms(batch, np.random.default_rng(seeds))
        self.scaler.scale(sum(terms.values())).backward()
        norm = self.update()
        if self.teacher:
            models.ema_update(self.teacher, self.model, self.config.ema)
            for mine, newest in zip(self.teacher.buffers(), self.model.buffers()):  # batch norm's statistics
                mine.copy_(newest)
        return {name: term.detach() for name, term in terms.items()}, {}, norm, dict(lr=lr)

    def evaluate(self):
        """-> {task: what measure() gives}"""
        model = (self.teacher or self.model).eval()
        for x in model.buffers() if self.place.world > 1 else ():
            dist.broadcast(x, 0)  # batch norm's statistics, of which each rank on CPUs has its own: rank 0's are saved
        return {self.task: self.measure(model)}

    def protocol(self):
        """What one must know to compare the score: the settings, but for those that do not change it."""
        free = {f.name for f in dataclasses.fields(train.LoopConfig)}
        return dict(set=self.tests(), config={name: value for name, value in dataclasses.asdict(self.config).items()
                                              if name not in free})

    def measure(self, model):
        """Accuracy on the test set: the shorter side at 256 / 224 of the size, cropped, bicubic (BEiT)."""
        tests, size = self.sets[1], model.config.image_size
        view = partial(data.center_crop, size=size, resample=Image.BICUBIC, short=size * 256 // 224)
        with self.amp:
            scores = evaluate.encode_pictures(model, tests.pictures, model, view)
        top5 = scores.topk(min(5, scores.size(1))).indices.eq(tests.targets[:, None]).any(1).float().mean().item()
        name = tests.metric or "accuracy"
        return dict(scores={name: evaluate.METRICS[name](scores, tests.targets), "top-5": top5},
                    chance=evaluate.chance(tests), remarks=tests.remarks,
                    over=f"{len(scores):,} pictures of {len(tests.names):,} classes, {self.size:,} to train",
                    protocol=evaluate.about(tests) | self.protocol())

    def finish(self, results):
        """The last evaluation's results."""
        return results or self.evaluate()

    def table(self, results):
        """Results as text, with the paper's where it has any."""
        named = {f"{task} {self.tests()}": result for task, result in results.items()}
        return evaluate.table({"": named}, [self.model.config.method])

    def tests(self):
        """What the test set is called."""
        return self.sets[1].name


def open_run(config, place):
    """Everything that the loop needs, from the last checkpoint where there is one.

    Raises ValueError where the settings, the data or the disk do not allow it.
    """
    sets = place.after_first(lambda: evaluate.probe_sets(config.data, config.root))  # the demo may be drawn
    if sets[0].targets.ndim > 1:
        raise ValueError(f"{sets[0].place}: pictures of several classes cannot be fine-tuned on here")
    return open_tuning(Tuning, config, place, sets, sets[0].targets.tolist(),
                       lambda shape: Classifier(shape, len(sets[0].names)))


def open_tuning(kind, config, place, sets, labels, model_of):
    """A run of `kind`, finetune's or segment's; sets: to train and to test; model_of(ModelConfig) -> its model.

    It goes on where pictures' names and labels are the same, wherever they lie.
    """
    names = [data.picture_name(picture).rpartition("/")[2] for picture in sets[0].pictures]
    size, digest = len(names), f"{len(names)} pictures, {zlib.crc32(repr((names, labels)).encode()):08x}"
    if config.batch_size > size:
        place.say(f"warning: {size} pictures are fewer than a batch of {config.batch_size}")
        config.batch_size = max(1, size // place.world) * place.world
    if config.batch_size % place.world:
        raise ValueError(f"--batch-size {config.batch_size} is the global batch: no multiple of {place.world} ranks")
    saved, source = train.find_saved(config, digest, ("data",), FIXED)  # data may move: the digest tells
    model = build(config, model_of, saved).to(place.device)
    for module in model.modules():
        if isinstance(module, models.Block):
            module.recompute = config.grad_checkpointing
    teacher = copy.deepcopy(model).requires_grad_(False) if config.ema else None
    if place.rank == 0:
        train.check_space(config, model, teacher)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), config.lr, (0.9, 0.999), eps=1e-8,  # BEiT
                                  fused=True)
    run = kind(config, place, model, teacher, optimizer, size, digest, source, sets=sets)
    for line in model.remarks:
        place.say(f"{config.checkpoint}: {line}")
    numbers = sum(p.numel() for p in model.parameters())
    run.start(saved, f"{config.checkpoint or 'random weights'}, {numbers / 1e6:.1f} M parameters; {config.data}: "
              f"{size:,} pictures")
    return run


if __name__ == "__main__":
    train.main(parse, open_run, "finetune.py")
