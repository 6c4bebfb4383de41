"""Pretraining: one plain loop for MaskCLIP and its five baselines (paper, section 4; recipes of SLIP).

    python train.py                                          # MaskCLIP on the drawn demo world, minutes on two cores
    python train.py --data FOLDER_OF_SHARDS --epochs 4       # your own pictures and captions
    torchrun --nproc_per_node=8 train.py --data yfcc15m      # the paper's run

Ideas: nanoGPT (a plain loop, schedules as functions of the step), DINO (teacher outside DDP and the optimiser).
"""
import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import fcntl
import gc
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
import losses
import model as models
from downstream import pictures
from tokenizer import Tokenizer


def flag(default, help):
    """A field of a config that is a flag on the command line."""
    return field(default=default, metadata=dict(help=help))


@dataclass
class LoopConfig:
    """How a run of `loop` goes: settings that do not change what is learned, and may differ when it goes on."""
    root: str = flag("", "where named data sets lie; else $MASKCLIP_DATA, else ./data")
    out: str = flag("", "folder of this run; else runs/ and what it is of")
    grad_checkpointing: bool = flag(False, "keep each block's input alone and compute the rest twice: less memory")
    workers: int = flag(-1, "loader processes per rank; -1: by the number of cores")
    log_every: int = flag(10, "steps between lines of log.jsonl")
    eval_every: int = flag(0, "epochs between evaluations (best.pt is the best), 0: at the end only")
    save_minutes: float = flag(20.0, "minutes between checkpoints, beside one per epoch")
    keep: int = flag(2, "checkpoints of whole epochs that are kept, beside last.pt and best.pt")     # our choice
    resume: str = flag("", "checkpoint to go on from; else last.pt in --out, where there is one")
    force: bool = flag(False, "go on from a checkpoint that was made with other settings or data")
    timeout_minutes: float = flag(10.0, "minutes a rank waits for another before the run ends")     # PyTorch's for NCCL
    steps: int = flag(0, "stop after this global step, 0: at the end; the schedules stay those of --epochs")


@dataclass
class TrainConfig(LoopConfig):
    """Everything that fixes a run; saved in each checkpoint.  Defaults are the paper's, or SLIP's CLIP recipe's."""
    data: list = flag(("demo",),
                      "demo, cc3m, cc12m, yfcc15m, or paths of shards, tables, class folders; NAME:2 is taken twice")
    method: str = flag("maskclip", ", ".join(models.METHODS))
    model: str = flag("vit_b16", ", ".join(models.PRESETS))
    depth: int = flag(0, "blocks of the image tower; 0: the model's (12, paper)")
    epochs: int = flag(25, "passes over the data")                                          # paper
    batch_size: int = flag(4096, "GLOBAL batch in pairs, whatever the number of GPUs")      # paper
    lr: float = flag(5e-4, "peak learning rate")                                            # SLIP recipe
    weight_decay: float = flag(0.5, "of matrices; biases and norms have none")              # SLIP recipe
    warmup_epochs: float = flag(1.0, "epochs of linear warm-up from 1e-6")                  # SLIP recipe
    beta1: float = flag(0.9, "AdamW's first beta")                                          # SLIP recipe
    beta2: float = flag(0.98, "AdamW's second beta")                                        # SLIP recipe
    crop_min: float = flag(0.5, "smallest share of the picture in a random crop")           # SLIP recipe
    vocab_size: int = flag(0, "0: CLIP's vocabulary; else learn so many entries from the captions")
    mask: str = flag("block", "block or random: which patches are hidden")                  # our choice
    mask_ratio: float = flag(0.75, "share of the patches that is hidden")                   # paper
    mlm_ratio: float = flag(0.2, "share of a caption's tokens that is masked")              # paper
    codewords: int = flag(0, "K of the online tokenizer; 0: the model's (8192, iBOT)")
    distill: str = flag("hidden", "hidden or all: the patches whose codewords are predicted")    # paper
    text_decoder_depth: int = flag(-1, "blocks of the text decoder; -1: the model's (4, paper)")
    distill_weight: float = flag(0.05, "lambda, weight of masked self-distillation")        # paper
    mlm_weight: float = flag(0.05, "beta, weight of masked language modelling")             # paper
    pixel_weight: float = flag(0.05, "weight of the pixel loss beside CLIP: lambda's place")  # our choice
    simclr_weight: float = flag(1.0, "weight of SimCLR beside CLIP")                        # SLIP
    ema_start: float = flag(0.999, "the teacher's momentum at the first step ...")          # BootMAE
    ema_end: float = flag(0.9999, "... and at the last, linear between")                    # BootMAE
    seed: int = flag(0, "of weights, order, crops and masks")
    grad_clip: float = flag(0.0, "largest norm of the gradient, 0: as it is")                # SLIP recipe: none
    init: str = flag("", "start from these weights: ours, OpenAI CLIP's, open_clip's, a timm or MAE ViT's")
    precision: str = flag("auto", "fp32, or autocast to bf16 or fp16 (loss scaled); auto: bf16 on CUDA")
    micro_batch: int = flag(0, "pairs of a rank computed at a time, same result (GradCache); 0: what fits on the GPU")
    compile: bool = flag(False, "compile the transformer blocks; for CUDA")
    bad_limit: float = flag(0.01, "stop when more than this share of the pairs could not be used")  # our choice


# What a data set changes.  A path takes demo's recipe with --model tiny (its default), else cc3m's.
RECIPES = dict(
    # Our choice: two CPU cores, about 600 steps.  The crop keeps small objects smaller than large ones.  Blocks of 75 %
    # of 8 x 8 patches leave the rim, and nobody can tell from it what is drawn in the middle: random masks.
    demo=dict(model="tiny", epochs=2, batch_size=64, lr=1e-3, weight_decay=0.1, warmup_epochs=0.2, crop_min=0.7,
              vocab_size=2048, mask="random", ema_start=0.99, ema_end=0.99),
    cc3m=dict(epochs=40),      # SLIP
    cc12m=dict(epochs=35),     # SLIP
    yfcc15m=dict(epochs=25),   # paper
)
# What a baseline changes in the recipes for large data.
METHOD_RECIPES = dict(
    slip=dict(lr=3e-3, weight_decay=0.1),                                                   # SLIP
    simclr=dict(lr=3.2e-3, weight_decay=0.1),                                               # SLIP
    mae=dict(lr=2.4e-3, weight_decay=0.05, beta2=0.95, crop_min=0.2),                       # MAE: 1.5e-4 a batch of 256
)
# Settings of pretraining that may differ when a run goes on, beside those of LoopConfig.
FREE = ("micro_batch", "compile", "bad_limit")
# Settings that a run keeps even with --force: they are in the shapes of its weights, or count its steps.
FIXED = ("method", "model", "vocab_size", "init", "batch_size", "depth", "codewords", "text_decoder_depth")


def given(config, about, argv=None):
    """The command line of a config's class -> {field: value} of what was given."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0], allow_abbrev=False)
    for f in dataclasses.fields(config):
        kind = {list: dict(nargs="+"), bool: dict(action="store_true")}.get(f.type, dict(type=f.type))
        parser.add_argument("--" + f.name.replace("_", "-"), **kind, default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (default: {f.default})")
    return vars(parser.parse_args(argv))


def parse(argv=None):
    """The command line -> TrainConfig."""
    return resolve(given(TrainConfig, __doc__, argv))


def resolve(given):
    """Settings that were given -> TrainConfig: defaults, the data set's recipe, the method's, then what was given.

    Raises ValueError for what cannot be.
    """
    names = given.get("data", ["demo"])
    first = names[0].partition(":")[0]  # without its weight
    recipe = first if first in RECIPES else "demo" if given.get("model", "tiny") == "tiny" else "cc3m"
    of_method = METHOD_RECIPES.get(given.get("method"), {}) if recipe != "demo" else {}
    config = TrainConfig(**{**RECIPES[recipe], **of_method, **given, "data": names})
    return settled(config, names, f"runs/{{}}-{config.method}",
                   dict(method=models.METHODS, model=models.PRESETS, mask=("block", "random"),
                        distill=("hidden", "all")),
                   ((0, math.inf, ("micro_batch", "depth", "codewords")), (-1, math.inf, ("text_decoder_depth",)),
                    (0, 1, ("mlm_ratio",)), (0.01, 1, ("crop_min",)), (0.01, 0.99, ("mask_ratio",))))


def settled(config, names, out, choices, ranges):
    """A config with its places filled in.  Raises ValueError for what cannot be.

    out: folder of the run, {} standing for the data's names; choices: {field: what it may be}; ranges: (lowest,
    highest, fields); those of all runs are known here.
    """
    for name, allowed in (choices | dict(precision=("auto", "fp32", "bf16", "fp16"))).items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"unknown --{name} '{getattr(config, name)}': one of {', '.join(allowed)}")
    for low, high, fields in (*ranges, (1, math.inf, ("epochs", "batch_size", "log_every")),
                              (0, math.inf, ("steps", "seed", "grad_clip", "eval_every", "keep")),
                              (0.01, 1e5, ("timeout_minutes",))):
        for name in fields:
            if not low <= getattr(config, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {low}"
                                 f"{'' if high == math.inf else f' and at most {high}'}, not {getattr(config, name)}")
    config.root = config.root or os.environ.get("MASKCLIP_DATA", "data")
    label = "+".join("-".join(Path(name).resolve().parts[-2:]) if os.sep in name else name for name in names)
    config.out = config.out or out.format(re.sub(r"[^-+.=0-9A-Z_a-z]+", "_", label))
    if Path(config.out).exists() and not Path(config.out).is_dir():
        raise ValueError(f"--out {config.out} is no folder")
    return config


# ---------------------------------------------------------------- schedules: pure functions of the step

def learning_rate(step, config, per_epoch, lowest=1e-5):
    """Linear warm-up from 1e-6, then a cosine to `lowest` (SLIP's 1e-5)."""
    total, warmup = config.epochs * per_epoch, config.warmup_epochs * per_epoch
    if step < warmup:
        return 1e-6 + (config.lr - 1e-6) * step / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return lowest + (config.lr - lowest) * (1 + math.cos(math.pi * share)) / 2


def ema_momentum(step, config, per_epoch):
    """Linear from ema_start to ema_end."""
    return config.ema_start + (config.ema_end - config.ema_start) * min(1.0, step / (config.epochs * per_epoch))


# ---------------------------------------------------------------- one step's gradients

def joint_terms(out):
    """The loss terms that compare pairs with one another.  -> {name: ()}, unweighted"""
    terms = {}
    if "image" in out:
        terms["image"], terms["text"] = losses.contrastive_loss(out["image"], out["text"], out["scale"])
    if "z1" in out:
        terms["simclr"] = losses.simclr_loss(out["z1"], out["z2"])
    return terms


def masked_terms(out, batch, teacher_logits, center, patch_size, totals):
    """The loss terms of the masked passes, means over hidden patches and masked words.  -> {name: ()}, unweighted

    totals: their numbers in the whole global batch, where `out` is of a part of a rank's share; else {}.
    """
    terms = {}
    if "pixels" in out:
        hidden = torch.zeros(out["pixels"].shape[:2], dtype=torch.bool, device=out["pixels"].device)
        hidden.scatter_(1, batch["ids_hide"], True)                                    # (B, N)
        terms["pixel"] = losses.pixel_loss(out["pixels"], batch["images"], hidden, patch_size,
                                           total=totals.get("hidden"))
    if "student_logits" in out:
        terms["distill"] = losses.distillation_loss(out["student_logits"].flatten(0, 1), teacher_logits, center,
                                                    total=totals.get("hidden"))
    if "mlm_logits" in out:
        terms["mlm"] = losses.mlm_loss(out["mlm_logits"], batch["mlm_targets"], totals.get("words"))
    return terms


def normalized(batch, name):
    """The batch with the pixels that a pass reads normalised, in float32."""
    what = "views" if name == "views" else "images"
    return batch | {what: data.normalize(batch[what])}


def split(batch, count):
    """A batch in `count` parts of equal size, in order."""
    if count == 1:
        return [batch]
    parts = [{} for _ in range(count)]
    for name, x in batch.items():
        if name not in ("mlm_ids", "mlm_targets"):
            for part, piece in zip(parts, x.chunk(count)):
                part[name] = piece
    if "mlm_ids" in batch:  # places in the flattened (B, L), so each part counts from its own start
        places = batch["tokens"].numel() // count
        for i, part in enumerate(parts):
            inside = batch["mlm_ids"] // places == i
            part["mlm_ids"] = batch["mlm_ids"][inside] - i * places
            part["mlm_targets"] = batch["mlm_targets"][inside]
    return parts


class Step:
    """One step's forward and backward passes: `gradients` adds the gradients of its loss to .grad.

    student: the model, or DistributedDataParallel around it; amp: autocast; loss: {name: ()} -> (), weighted, scaled.
    Each of the model's passes goes forward and back before the next: no two hold their activations at a time.
    """

    def __init__(self, model, student, teacher, amp, loss):
        self.model, self.student, self.teacher, self.amp, self.loss = model, student, teacher, amp, loss
        self.center = teacher.center if teacher else None
        self.device, self.patch_size = next(model.parameters()).device, model.config.patch_size
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def sent(self, parts):
        """Parts of a batch on the device; a GPU takes them, from pinned memory, beside what it still computes."""
        with torch.cuda.stream(self.side):  # None: no other stream
            parts = [{name: x.to(self.device, non_blocking=True) for name, x in part.items()} for part in parts]
        if self.side:
            here = torch.cuda.current_stream(self.device)
            here.wait_stream(self.side)
            for x in itertools.chain(*map(dict.values, parts)):
                x.record_stream(here)
        return parts

    def gradients(self, parts):
        """Of a batch in parts (`split`, `sent`).

        -> loss terms {name: ()}, unweighted; image and text features, if any; the teacher's mean logits (parts, K)
        """
        terms, features, means = {}, {}, None
        totals = self.totals(parts) if len(parts) > 1 else {}
        for name in self.model.passes:
            # DDP averages when the last pass goes back.  What only the others left in .grad it averages too: its hooks
            # note each parameter that had a gradient, though it is not asked (find_unused_parameters).
            module = self.student if name == self.model.passes[-1] else self.model
            if name == "masked":
                of_parts, means = zip(*(self.masked(module, part, totals) for part in parts))
                of_pass = {key: sum(of_part[key] for of_part in of_parts) for key in of_parts[0]}
                means = torch.cat(means) if self.teacher else None
            else:
                of_pass, out = self.cached(name, parts) if len(parts) > 1 else self.whole(module, name, *parts)
                features |= {key: out[key].detach() for key in ("image", "text") if key in out}
            terms = {key: term.detach() for key, term in of_pass.items()} | terms  # CLIP's come first in the log
        if len(parts) > 1:
            average_gradients(self.model)
        return terms, features, means

    def masked(self, module, part, totals):
        """The masked pass through one part, forward and back.  -> terms, the teacher's mean logits (1, K) or None"""
        part = normalized(part, "images")
        with self.amp:
            logits, out = self.targets(part), module(part, ("masked",))
        terms = masked_terms(out, part, logits, self.center, self.patch_size, totals)
        self.loss(terms).backward()
        return terms, logits.mean(0, keepdim=True, dtype=torch.float32) if self.teacher else None

    @torch.no_grad()
    def codeword_use(self, parts):
        """losses.codeword_use of a batch in parts, by the teacher as it is now.  -> (2, K)"""
        use = 0
        for part in parts:
            with self.amp:
                logits = self.targets(normalized(part, "images"))
            use += losses.codeword_use(logits, self.center)
        return use

    def targets(self, batch):
        """The teacher's logits (B * M, K), None without a teacher."""
        return self.teacher(batch["images"], self.model.distilled(batch)).flatten(0, 1) if self.teacher else None

    def whole(self, module, name, batch):
        """A pass that compares pairs, forward and back.  -> terms, what forward gave"""
        with self.amp:
            out = module(normalized(batch, name), (name,))
        terms = joint_terms(out)
        self.loss(terms).backward()
        return terms, out

    def cached(self, name, parts):
        """The same in parts, where the whole does not fit: GradCache (Gao et al. 2021).  Equal but for rounding.

        The features of all parts are computed without gradient; the losses that compare pairs are taken on all of them
        and give each feature its gradient; then each part is computed again and takes that gradient on.  SimCLR's head,
        which normalises over the batch, stands behind the features: it sees all.
        """
        with torch.no_grad():
            pieces = [self.features(name, part) for part in parts]
        features = {key: torch.cat([piece[key] for piece in pieces]).requires_grad_() for key in pieces[0]}
        with self.amp:
            out = self.model.across(features)
        terms = joint_terms(out)
        self.loss(terms).backward()
        for part, *gradients in zip(parts, *(x.grad.chunk(len(parts)) for x in features.values())):
            torch.autograd.backward(list(self.features(name, part).values()), gradients)
        return terms, out

    def features(self, name, part):
        """What a pass computes of each pair by itself."""
        with self.amp:
            return getattr(self.model, name)(normalized(part, name))

    def totals(self, parts):
        """Hidden (or distilled) patches and masked words of the global batch: the masked losses are means over them."""
        numbers = {name: sum(part[ids].numel() for part in parts) for name, ids in
                   (("hidden", "ids_hide"), ("words", "mlm_ids")) if ids in parts[0]}
        if self.teacher:
            numbers["hidden"] = sum(self.model.distilled(part).numel() for part in parts)
        return {name: losses.all_sum(torch.full((), float(n), device=self.device)) for name, n in numbers.items()}

    def largest_part(self, batch):
        """How many of this rank's pairs fit at once: all of them, or, found by halving, a divisor of their number.

        On the GPU, before the first step: what optimiser and DDP will allocate is held meanwhile, and a tenth of the
        memory more (our choice: later texts may be longer).
        """
        parameters, ones = sum(p.numel() for p in self.model.parameters()), torch.ones((), device=self.device)
        spare = 3 * 4 * parameters + torch.cuda.get_device_properties(self.device).total_memory // 10
        spare += 2 * sum(x.nbytes for x in batch.values())  # this batch and the next, on its way

        def rehearse(count):
            held = torch.empty(spare, dtype=torch.uint8, device=self.device)
            part, = self.sent(split(batch, count)[:1])
            for name in self.model.passes:  # no rank waits for another here
                if name == "masked":
                    self.masked(self.model, part, dict(hidden=ones, words=ones))
                else:
                    features = self.features(name, part).values()
                    torch.autograd.backward(list(features), [torch.zeros_like(x) for x in features])
            del held
        size = fitting(len(next(iter(batch.values()))), rehearse)
        self.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return size


def fitting(share, rehearse):
    """The size of the parts of a share: the whole, or less where rehearse(number of parts) is out of memory."""
    size = share
    while True:
        try:
            rehearse(share // size)
            return size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        torch.cuda.empty_cache()
        size = max(n for n in range(1, size // 2 + 1) if share % n == 0)


def average_gradients(model):
    """The mean of each gradient over the ranks: what DDP does during one backward pass, here after several."""
    if dist.is_initialized():
        waits = [dist.all_reduce(p.grad, async_op=True) for p in model.parameters()]
        for wait in waits:
            wait.wait()
        torch._foreach_div_([p.grad for p in model.parameters()], dist.get_world_size())


def parameter_groups(model, weight_decay):
    """Matrices decay, and with them (SLIP) positions, class and mask tokens, embeddings and codewords.

    What has fewer than two dimensions does not: biases, norms, the logit scale.
    """
    decay = [p for p in model.parameters() if p.ndim >= 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    return [dict(params=decay, weight_decay=weight_decay), dict(params=other, weight_decay=0.0)]


# ---------------------------------------------------------------- ranks

@dataclass
class Place:
    """This process among those of the run."""
    rank: int
    world: int
    device: torch.device
    store: object = None        # a dictionary that all ranks share
    host_group: object = None   # for the CPUs to exchange small things while the GPUs work

    def after_first(self, function):
        """function() on rank 0 and then on the others, for which what it wrote is there."""
        while self.rank > 0 and not self.store.check(["written"]):  # for as long as it takes to read all headers
            time.sleep(0.2)
        value = function()
        if self.rank == 0 and self.world > 1:
            self.store.set("written", "")
        return value

    def say(self, text):
        """A line from rank 0, beside its bar."""
        if self.rank == 0:
            tqdm.write(text)


def join(minutes):
    """Take the place that torchrun's environment names, or be alone; nobody waits longer than `minutes` for another."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"local rank {device.index} has no GPU, {torch.cuda.device_count()} are seen here: start "
                             "as many processes on a machine, and let each see all of its GPUs")
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; matrix products are so by default
    else:
        keep_memory()
    if world == 1:
        return Place(rank, world, device)
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        print("warning: after a restart ranks may find the addresses of dead ones (pytorch issue 135712): start "
              "torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    limit = datetime.timedelta(minutes=minutes)
    nccl = device.type == "cuda"  # it kills a process that waits too long: later, so that Stop can say who is lost
    try:
        store = next(dist.rendezvous("env://", timeout=limit))[0]
        dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=rank, world_size=world,
                                timeout=2 * limit if nccl else limit)
        return Place(rank, world, device, store, dist.new_group(backend="gloo", timeout=limit))
    except RuntimeError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConnectionError(f"cannot meet the other {world - 1} ranks at {where} within {minutes} minutes: "
                              f"{str(error).splitlines()[0]}") from error


def keep_memory():
    """Let malloc keep what is freed: large tensors taken anew from the system, page by page, cost up to a tenth."""
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)              # M_MMAP_MAX: nothing from mmap, which gives back at once
        mallopt(-1, 2 ** 31 - 1)    # M_TRIM_THRESHOLD: the end of the heap only above 2 GiB


def lost_ranks(place):
    """The ranks that do not answer within ten seconds; rank 0 where the store itself, which it may keep, does not."""
    lost = [0]

    def ask():
        try:
            place.store.set(f"here/{place.rank}", "")
            for _ in range(100):
                lost[:] = [rank for rank in range(place.world) if not place.store.check([f"here/{rank}"])]
                if not lost:
                    break
                time.sleep(0.1)
        except dist.DistError:
            lost[:] = [0]
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(12)
    return lost


class Stop:
    """SIGINT, SIGTERM and SIGUSR1 on any rank, known to all ranks at the same step.

    Asked once a step: the answer is that of the step before, which the CPUs have exchanged meanwhile.  A second signal
    ends the process at once.
    """

    def __init__(self, place):
        self.group, self.name, self.at, self.work, self.told = place.host_group, "", None, None, None
        for number in data.STOPS:
            signal.signal(number, self.note)

    def note(self, number, _):
        # Within two seconds it is the same one: a scheduler tells all processes, and torchrun passes it on to its own.
        if self.name and time.monotonic() - self.at > 2:
            os._exit(128 + number)
        if not self.name:
            self.name, self.at = signal.Signals(number).name, time.monotonic()

    def __call__(self):
        """Whether to stop now."""
        if self.group is None:
            return bool(self.name)
        stop = self.settle()
        self.told = torch.tensor(float(bool(self.name)))
        self.work = dist.all_reduce(self.told, group=self.group, async_op=True)
        return stop

    def settle(self):
        """Wait for the exchange under way: what it said."""
        if self.work is not None:
            self.work.wait()
        self.work = None
        return self.told is not None and bool(self.told)


# ---------------------------------------------------------------- checkpoints and the log

def resumed_from(path):
    """The --resume of the run that made a checkpoint; "" where it is damaged."""
    try:
        return evaluate.read_checkpoint(path).get("config", {}).get("resume", "")
    except ValueError:
        return ""


def read_saved(out, resume=""):
    """What --resume names, else last.pt in --out, and its path; None, None where there is none.

    Where last.pt was made by this --resume already, it is that.  Raises FileNotFoundError where --resume is missing,
    ValueError where the checkpoint is damaged, or --out holds others only.
    """
    out, own = Path(out), Path(out) / "last.pt"
    path = Path(resume or own)
    older = ", ".join(map(str, sorted(set(out.glob("*.pt")) - {own}, key=os.path.getmtime)))
    if not resume and not own.is_file():
        if older:
            raise ValueError(f"{out} holds {older} but no last.pt: --resume one of them, or give another --out")
        return None, None
    if own.is_file() and path.resolve() != own.resolve() and resumed_from(own) == resume:
        path = own
    try:
        return evaluate.read_checkpoint(path), path
    except ValueError as error:
        raise ValueError(f"{error}; older ones are {older}: --resume one of them with --force" if older else
                         str(error)) from error


def find_saved(config, digest, free=(), fixed=()):
    """The checkpoint that the run goes on from and its path, or None, None: --resume, else last.pt in --out.

    digest: of the data.  free, fixed: settings that may differ, and those that may not even with --force.  Raises what
    read_saved raises, and ValueError where the settings or the data differ, or --out holds another run.
    """
    saved, path = read_saved(config.out, config.resume)
    if not saved:
        return None, None
    own = Path(config.out) / "last.pt"
    if own.is_file() and path.resolve() != own.resolve() and not config.force:
        raise ValueError(f"--resume {path} would overwrite the run in {config.out}: give another --out, or --force to "
                         "take this one back to it")
    if "made_by" not in saved:
        raise ValueError(f"{path} is of an older version: it can be evaluated and be --init of another run, not go on")
    mine = dataclasses.asdict(config)
    if odd := saved["config"].keys() - mine.keys():
        raise ValueError(f"{path} is of another kind of run, with the settings {', '.join(sorted(odd)[:5])}: give "
                         "another --out")
    theirs = dataclasses.asdict(type(config)()) | saved["config"]  # settings younger than it had their defaults
    free = {*free, *(f.name for f in dataclasses.fields(LoopConfig))}
    other = {name: f"--{name.replace('_', '-')} {theirs[name]} there, {value} now"
             for name, value in mine.items() if name not in free and theirs[name] != value}
    never = [other[name] for name in fixed if name in other]
    if never or other and not config.force:
        way_out = "" if never else ", those settings to go on with it, or --force to go on with the new ones"
        raise ValueError(f"{path} was made with other settings ({'; '.join(never or other.values())}): give another "
                         f"--out{way_out}")
    if saved["pairs"] != digest and not config.force:
        raise ValueError(f"the data was another when the checkpoint was made ({saved['pairs']} then, {digest} now), so "
                         "the order would be another: give another --out, or --force to go on all the same")
    return saved, path


def check_space(config, model, teacher=None):
    """Raise ValueError where the disk cannot hold the checkpoints of this run."""
    out = Path(config.out).resolve()
    place = next(folder for folder in (out, *out.parents) if folder.is_dir())
    numbers = 3 * sum(p.numel() for p in model.parameters())  # weights and AdamW's two moments
    size = 4 * (numbers + sum(p.numel() for p in teacher.parameters()) if teacher else numbers)
    files = 2 + min(config.keep, config.epochs) + (config.eval_every > 0)  # last.pt and the one that is being written
    have = shutil.disk_usage(place).free + sum({s.st_ino: s.st_size for s in map(Path.stat, out.glob("*.pt"))}.values())
    if have < files * size:
        raise ValueError(f"{files} checkpoints of {size / 1e9:.2f} GB do not fit in {config.out}, where "
                         f"{have / 1e9:.2f} GB are free: make room, or give another --out or a smaller --keep")


def save(out, state, names=()):
    """Write out/last.pt, and the same under further names; a crash at any moment leaves each as it was, or whole.

    Raises OSError, also where the disk is full.
    """
    part, link = out / "last.partial", out / "link.partial"
    part.unlink(missing_ok=True)  # after a crash it may be another name of an older checkpoint: not to be written over
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter after the file's own error
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {part}: {error.__context__ or error}") from error
    for name in names:
        link.unlink(missing_ok=True)
        try:
            os.link(part, link)  # one file under two names takes no room
        except OSError:  # a file system without such names
            shutil.copyfile(part, link)
        os.replace(link, out / name)
    os.replace(part, out / "last.pt")


def prune(out, epoch, keep):
    """Delete the checkpoints of epochs but for the last `keep`; later ones are of a run that was taken back."""
    for file in out.glob("epoch-*.pt"):
        number = re.fullmatch(r"epoch-(\d+)\.pt", file.name)
        if number and not epoch - keep < int(number[1]) <= epoch:
            file.unlink()


class Log:
    """log.jsonl, which one run at a time may write, and TensorBoard's file beside it where that is installed."""

    def __init__(self, out):
        self.out, self.path, self.pending, self.board = out, out / "log.jsonl", b"", None
        self.file = open(self.path, "ab", buffering=0)
        os.register_at_fork(after_in_child=self.file.close)  # the lock ends with this process, not with its loaders
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing to {out}: give another --out") from error
        except OSError:  # a file system without locks
            pass

    def go_on(self, step):
        """Cut off what an interrupted run wrote after `step`.  Raises ValueError for a file that is no log."""
        end = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"line {number} of {self.path} is none of a log: mend it or move the file away"
                                 ) from error
            end += len(line)
        self.file.truncate(end)
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(self.out, purge_step=step + 1)
        except ImportError:
            pass

    def write(self, record):
        """One line.  What is not finite becomes null, for JSON has no word for it; a full disk gets it later."""
        record = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in record.items()}
        self.pending += json.dumps(record).encode() + b"\n"
        with contextlib.suppress(OSError):
            self.flush()
            for name, x in record.items() if self.board else ():
                if isinstance(x, (int, float)):
                    self.board.add_scalar(name, x, record["step"])

    def flush(self):
        """Write what is pending.  Raises OSError where the disk is full."""
        while self.pending:
            self.pending = self.pending[self.file.write(self.pending):]

    def sync(self):
        """Flush to disk: no checkpoint may be ahead of its log.  Raises OSError."""
        self.flush()
        os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
        if self.board:
            self.board.close()


# ---------------------------------------------------------------- the run

@dataclass
class Run:
    """What `loop` runs; all but the counters stays what it is.  Pretraining below and downstream/ say how it steps."""
    config: LoopConfig
    place: Place
    model: torch.nn.Module
    teacher: torch.nn.Module | None     # a moving average of weights
    optimizer: torch.optim.Optimizer
    size: int               # samples in an epoch
    digest: str             # of the data and their order
    source: Path = None     # the checkpoint that the run goes on from
    step: int = 0           # steps done
    bad: int = 0            # pairs of this rank that could not be used; on rank 0, all of before a resume too
    best: float = 0.0       # highest score of --eval-every

    def __post_init__(self):
        kind = self.place.device.type
        name = {"auto": "bf16" if kind == "cuda" else "fp32"}.get(self.config.precision, self.config.precision)
        dtype = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[name]
        self.precision, self.amp = name, torch.autocast(kind, dtype, enabled=name != "fp32")
        self.scaler = torch.amp.GradScaler(kind, enabled=name == "fp16")
        self.per_epoch = self.size / self.config.batch_size                         # steps in an epoch
        self.total = self.config.epochs * self.size // self.config.batch_size       # steps in the run
        # Steps without an update, for loss or gradient was not finite, and the last of these without one between.
        self.skipped, self.in_a_row = (torch.zeros((), device=self.place.device) for _ in range(2))

    def parts(self):
        """What has a state of its own."""
        parts = dict(model=self.model, optimizer=self.optimizer, scaler=self.scaler)
        return parts | (dict(teacher=self.teacher) if self.teacher else {})

    def state(self, bad):
        """All that a checkpoint holds: tensors, numbers, strings.  bad: of all ranks."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return dict(step=self.step, pairs=self.digest, bad=bad, skipped=self.skipped.cpu(),
                    in_a_row=self.in_a_row.cpu(), best=self.best, config=dataclasses.asdict(self.config),
                    model_config=dataclasses.asdict(self.model.config), **self.facts(),
                    rng=dict(cpu=torch.get_rng_state(), cuda=cuda), made_by=evaluate.provenance(),
                    **{name: part.state_dict() for name, part in self.parts().items()})

    def load(self, saved):
        """Go on from what `state` gave."""
        fresh = [dict(group, params=()) for group in self.optimizer.param_groups]
        for name, part in self.parts().items():
            if saved.get(name):  # the scaler's is empty but with fp16
                part.load_state_dict(saved[name])
        for group, new in zip(self.optimizer.param_groups, fresh, strict=True):  # by --force they may be other ones
            group.update({key: new[key] for key in ("weight_decay", "betas", "scale") if key in new})
        self.step, self.bad = saved["step"], saved["bad"] if self.place.rank == 0 else 0
        self.best = saved["best"]
        self.skipped.copy_(saved["skipped"])
        self.in_a_row.copy_(saved["in_a_row"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if torch.cuda.is_available() and len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])

    def start(self, saved, what):
        """Go on from a checkpoint, where there is one, and say what begins.  Raises ValueError where ranks differ."""
        if saved:
            self.load(saved)
        place, config = self.place, self.config
        if place.world > 1:
            starts = [None] * place.world
            dist.all_gather_object(starts, (self.step, self.digest), place.host_group)
            if len(set(starts)) > 1:
                raise ValueError(f"the ranks start from different steps or data ({'; '.join(map(str, starts))}): --out "
                                 "and the data must be the same folders on all nodes")
        place.say(f"{what}; {config.epochs} epochs of {self.per_epoch:.1f} steps; batch {config.batch_size} = "
                  f"{place.world} x {config.batch_size // place.world}; {self.precision} on {place.device.type}\n"
                  + " ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items())
                  + (f"\ngoing on from step {self.step} of {self.source}" if saved else ""))

    def watch(self):
        """What the log has beside the losses, of all ranks."""
        return {}

    def draw(self, results):
        """Pictures of a kind of run's own, in its folder; rank 0 alone is asked."""

    def update(self):
        """The weights after the gradients.  -> the gradient's norm ()"""
        optimizer, scaler, config = self.optimizer, self.scaler, self.config
        scaler.unscale_(optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]  # a frozen part has none
        norm = torch.nn.utils.get_total_norm(gradients)
        if config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), config.grad_clip, norm)
        # Averaged over the ranks, so all of them see it where one has a loss or gradient that is not finite; the fused
        # AdamW then leaves weights and moments as they are, without the host having to know.
        lost = optimizer.found_inf = (~norm.isfinite()).float()
        scaler.step(optimizer)
        scaler.update()
        self.step += 1
        self.skipped.add_(lost)
        self.in_a_row.copy_(torch.where(self.in_a_row < 10, (self.in_a_row + 1) * lost, self.in_a_row))
        return norm


@dataclass
class Pretraining(Run):
    """The paper's: pairs, six methods."""
    pairs: data.Pairs = None
    tokenizer: Tokenizer = None
    last: list = None  # this rank's last batch, in parts on the device

    def watch(self):
        """Whether the teacher's targets collapse: the entropy of its mean distribution over the codewords, in nats (at
        most log K), and the number of codewords that are some patch's most likely one.
        """
        if not self.teacher:
            return {}
        distribution, used = losses.all_sum(self.gradients.codeword_use(self.last))
        entropy = torch.special.entr(distribution / distribution.sum()).sum()
        return dict(codeword_entropy=entropy.item(), codewords_used=int((used > 0).sum()))

    def facts(self):
        """What a checkpoint holds of this kind of run alone."""
        return dict(tokenizer=[" ".join(pair) for pair in self.tokenizer.merges])

    def batches(self, stop_at):
        """This rank's share of the global batches from here on."""
        self.gradients, self.count, batches = make_step(self, iter(open_loader(self, stop_at)))
        return batches

    def advance(self, batch):
        """One step.

        -> loss terms {name: ()}, unweighted; image and text features, if any; gradient's norm (); lr and ema
        """
        self.last = self.gradients.sent(split(batch, self.count))
        return advance(self, self.gradients, self.last)

    def evaluate(self):
        """What --eval-every asks for.  -> {name: what evaluate.EVALUATIONS[name] gives}"""
        results = evaluations(self, ["zeroshot" if "text" in self.model.needs else "linear"])
        if not results:
            self.place.say(f"--eval-every: no test set could be evaluated beside {self.pairs.sources[0].folder}")
        return results

    def finish(self, results):
        """The last evaluation's results and those that it lacks."""
        has_text = "text" in self.model.needs
        names = [name for name in evaluate.EVALUATIONS if has_text != (name == "linear") and name not in results]
        return results | evaluations(self, names)

    def table(self, results):
        """Results as text."""
        return report(self.pairs, results)

    def tests(self):
        """What the test sets are called."""
        return Path(self.pairs.sources[0].folder).resolve().parent.name


def open_pairs(config, place):
    """The pairs of all data sets; rank 0 draws the demo and writes the indices before the others look.

    Raises ValueError where they, the batch and the ranks do not go together.
    """
    pairs = place.after_first(lambda: data.Pairs(config.data, config.root))
    for line in pairs.damage:
        place.say(f"warning: {line}")
    if len(pairs) < config.batch_size == TrainConfig.batch_size:
        config.batch_size = 2 ** int(math.log2(len(pairs)))
        place.say(f"warning: {len(pairs)} pairs are fewer than the paper's batch of {TrainConfig.batch_size}: batches "
                  f"of {config.batch_size}, with a learning rate made for the other")
    if len(pairs) < config.batch_size:
        raise ValueError(f"{len(pairs)} pairs are fewer than one global batch: give --batch-size {len(pairs)} or less")
    share, rest = divmod(config.batch_size, place.world)
    if rest:
        raise ValueError(f"--batch-size {config.batch_size} is the global batch: no multiple of {place.world} ranks")
    if share % (min(config.micro_batch, share) or share):
        raise ValueError(f"--micro-batch {config.micro_batch} does not divide {share}, a rank's share of the batch")
    return pairs


def make_tokenizer(config, pairs, saved):
    """The tokenizer of the checkpoint or of --init, or one learned from the first million captions, or CLIP's."""
    if saved and "tokenizer" in saved:
        return evaluate.saved_tokenizer(saved)
    return Tokenizer.train(pairs.captions(1_000_000), config.vocab_size) if config.vocab_size else Tokenizer.clip()


def make_model(config, place, vocab_size, init):
    """A model with fresh weights, or those of --init as far as they go.  Raises ValueError where they do not fit."""
    torch.manual_seed(config.seed)
    shape = models.PRESETS[config.model]
    shape = dataclasses.replace(
        shape, method=config.method, vocab_size=vocab_size, depth=config.depth or shape.depth,
        codewords=config.codewords or shape.codewords, distill=config.distill,
        text_decoder_depth=shape.text_decoder_depth if config.text_decoder_depth < 0 else config.text_decoder_depth)
    if not init:
        return models.build(shape)
    like = ("quick_gelu", "pre_norm", "patch_bias", "image_norm_eps")  # of the tower, beside its shape
    model = models.build(dataclasses.replace(shape, **{name: getattr(init["config"], name) for name in like}))
    own = model.state_dict()
    taken = {name: x for name, x in init["model"].items() if name in own}
    wrong = [f"{name} {list(x.shape)}, here {list(own[name].shape)}" for name, x in taken.items()
             if x.shape != own[name].shape]
    if init["config"].depth != model.config.depth:
        wrong.append(f"an image tower of {init['config'].depth} blocks, here {model.config.depth}")
    if wrong:
        raise ValueError(f"--init {config.init} does not fit --model {config.model}: {'; '.join(wrong[:3])}")
    model.load_state_dict(own | taken)
    fresh = sorted({name.partition(".")[0] for name in own.keys() - taken.keys()})
    place.say(f"{len(taken)} of {len(own)} tensors are those of {config.init}; fresh: {', '.join(fresh) or 'none'}")
    return model


def open_run(config, place):
    """Everything that the loop needs, from the last checkpoint where there is one.

    Raises ValueError where the settings, the data or the disk do not allow it.
    """
    pairs = open_pairs(config, place)
    saved, source = find_saved(config, pairs.digest(), FREE, FIXED)
    init = evaluate.read_weights(config.init) if config.init and not saved else None
    tokenizer = make_tokenizer(config, pairs, saved or init)
    if saved:
        model = models.build(models.ModelConfig(**saved["model_config"] | dict(distill=config.distill)))  # by --force
    else:
        model = make_model(config, place, len(tokenizer), init)
    model.to(place.device)
    teacher = models.Teacher(model).to(place.device) if config.method == "maskclip" else None
    for module in [*model.modules(), *(teacher.modules() if teacher else ())]:
        if isinstance(module, models.Block):
            module.recompute = config.grad_checkpointing
            if config.compile:
                # Towers, decoders, masks, gradients, ten lengths of text (data.Samples.collate), and the sizes that
                # Step.largest_part tries, share one code.
                torch._dynamo.config.recompile_limit = 256
                module.compile(dynamic=False)
    if place.rank == 0:
        check_space(config, model, teacher)

    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), config.lr, (config.beta1, config.beta2),
                                  eps=1e-8, fused=True)  # eps: SLIP recipe
    run = Pretraining(config, place, model, teacher, optimizer, len(pairs), pairs.digest(), source,
                      pairs=pairs, tokenizer=tokenizer)
    run.start(saved, f"{config.method} {config.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M "
              f"parameters, {len(tokenizer):,} tokens; {', '.join(config.data)}: {len(pairs):,} pairs")
    return run


def open_loader(run, stop_at):
    """This rank's share of the global batches from run.step on."""
    samples = data.Samples(run.pairs, run.tokenizer, run.model.needs, run.config, run.model.config)
    return loader(run, stop_at, samples, run.pairs.sizes, samples.collate)


def loader(run, stop_at, samples, sizes, collate=None):
    """The samples of a run from run.step on, by (epoch, index), in the exact order of parts of those sizes."""
    config, place = run.config, run.place
    order = data.Order(sizes, config.seed)
    batches = data.GlobalBatches(order, config.batch_size, run.step, stop_at, place.rank, place.world)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", place.world))
    workers = config.workers if config.workers >= 0 else max(0, min(8, (os.cpu_count() or 1) // here - 1))
    return torch.utils.data.DataLoader(samples, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                                       pin_memory=place.device.type == "cuda", worker_init_fn=data.ignore_stops)


def make_step(run, batches):
    """How a step is computed, and in how many parts.  -> Step, count, the batches"""
    config, place = run.config, run.place
    weights = dict(distill=config.distill_weight, mlm=config.mlm_weight)
    if "text" in run.model.needs:  # beside CLIP; alone they are the whole loss
        weights |= dict(pixel=config.pixel_weight, simclr=config.simclr_weight)
    step = Step(run.model, run.model, run.teacher, run.amp,
                lambda terms: run.scaler.scale(sum(weights.get(name, 1.0) * term for name, term in terms.items())))
    share = config.batch_size // place.world
    size = min(config.micro_batch or share, share)
    if place.device.type == "cuda" and not config.micro_batch:
        for first in batches:
            size = step.largest_part({name: x for name, x in first.items() if name != "bad"})
            if place.world > 1:
                smallest = torch.tensor(float(size))
                dist.all_reduce(smallest, dist.ReduceOp.MIN, place.host_group)
                size = int(smallest)
            batches = itertools.chain([first], batches)
            if size < share:
                place.say(f"{share} pairs do not fit on the GPU: {size} at a time, as by --micro-batch {size}")
            break
    if place.world > 1 and size == share:
        step.student = DistributedDataParallel(run.model, find_unused_parameters=len(run.model.passes) > 1)
    return step, share // size, batches


def open_log(run):
    """The log on rank 0, None on the others, as a context."""
    if run.place.rank > 0:
        return contextlib.nullcontext()
    out = Path(run.config.out)
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out)
    if run.source and run.source.resolve() != (out / "last.pt").resolve():
        save(out, run.state(run.bad))  # before the log is cut: from here on this is where the run stands
    log.go_on(run.step)
    return contextlib.closing(log)


def advance(run, step, parts):
    """One step of pretraining: gradients, weights, teacher.

    -> loss terms {name: ()}, unweighted; image and text features, if any; gradient's norm (); lr and ema
    """
    config, model, teacher = run.config, run.model, run.teacher
    lr, momentum = (schedule(run.step, config, run.per_epoch) for schedule in (learning_rate, ema_momentum))
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad(set_to_none=True)
    terms, features, means = step.gradients(parts)
    norm = run.update()
    if "text" in model.needs:
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # CLIP
    if teacher:
        models.ema_update(teacher, model, momentum)
        losses.update_center(teacher.center, means)
    return terms, features, norm, dict(lr=lr) | (dict(ema=momentum) if teacher else {})


def loop(run, log):
    """Step by step to the end or to a signal, then the report."""
    config, place, out = run.config, run.place, Path(run.config.out)
    stop_at = min(run.total, config.steps or run.total)
    batches = run.batches(stop_at)
    stop_now, saved_step = Stop(place), run.step
    bar = tqdm(total=stop_at, initial=run.step, desc=out.name, unit="step", mininterval=1,
               disable=None if place.rank == 0 else True)  # a bar on a terminal, lines elsewhere
    named, results, stop, waited, seen, clock, saved_at = [], {}, False, 0.0, 0, time.time(), time.time()

    while run.step < stop_at and not stop:
        start = time.time()
        batch = next(batches)
        waited += time.time() - start
        for line in batch.pop("bad", ()):
            run.bad += 1
            if run.bad <= 10:
                tqdm.write(f"warning: bad pair, another takes its place: {line}")
                named.append(line)
        terms, features, norm, schedules = run.advance(batch)
        seen += config.batch_size
        bar.update()

        stop = stop_now()
        epoch, place_in_epoch = divmod(run.step * config.batch_size, run.size)
        epoch_ends = place_in_epoch < config.batch_size or run.step == run.total
        epoch = config.epochs if run.step == run.total else epoch  # the last step may end short of the last pairs
        evaluate_now = epoch_ends and config.eval_every and (epoch % config.eval_every == 0 or run.step == run.total)
        log_now = run.step % config.log_every == 0 or run.step == stop_at or evaluate_now
        save_now = epoch_ends or run.step == stop_at or stop
        if log_now or save_now:  # the only times at which the device is waited for
            values = dict(terms)
            if features:
                values["accuracy"] = losses.contrastive_accuracy(**features)
            sums = losses.all_sum(torch.stack([*values.values(), norm.new_tensor(run.bad)]))
            *means, bad = (sums / sums.new_tensor([place.world] * len(values) + [1])).tolist()
            values, bad = dict(zip(values, means)), int(bad)
            check(run, values, bad, saved_step)
        watched = run.watch() if log_now else {}
        pause = time.time()
        results = run.evaluate() if evaluate_now else {}
        clock += time.time() - pause
        scores = {name: next(iter(result["scores"].values())) for name, result in results.items()}
        best_before, run.best = run.best, max([run.best, *scores.values()])
        is_best = run.best > best_before
        if log and log_now:
            spent, peak = time.time() - clock, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else (
                1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            log.write(dict(step=run.step, epoch=run.step / run.per_epoch, **values, **scores,
                           **dict(scale=run.model.logit_scale.exp().item()) if features else {}, **watched, **schedules,
                           grad_norm=norm.item(), skipped=int(run.skipped),
                           **dict(loss_scale=run.scaler.get_scale()) if run.scaler.is_enabled() else {}, bad=bad,
                           **dict(bad_pairs=named) if named else {}, pictures_per_s=round(seen / spent, 1),
                           data_wait=round(waited / spent, 3), memory_gib=round(peak / 2 ** 30, 2)))
            short = " ".join(f"{name} {x:.2f}" for name, x in values.items()) + f" {seen / spent:.0f} pictures/s"
            bar.set_postfix_str(short)
            if bar.disable:
                print(f"step {run.step}/{stop_at} {short}", flush=True)
            named, waited, seen, clock = [], 0.0, 0, time.time()
        if log and (save_now or log_now and time.time() - saved_at > 60 * config.save_minutes):
            names = [f"epoch-{epoch}.pt"] * bool(epoch_ends and config.keep) + ["best.pt"] * is_best
            try:
                log.sync()
                save(out, run.state(bad), names)
                saved_step = run.step
                if epoch_ends:
                    prune(out, epoch, config.keep)
                pictures.curves(out / "log.jsonl", out / "curves.svg")
            except OSError as error:
                if stop or run.step == stop_at:
                    raise
                run.best = best_before
                place.say(f"warning: step {run.step} is not saved, next try in {config.save_minutes} minutes: {error}")
            saved_at = time.time()

    stop_now.settle()
    bar.close()
    for number in data.STOPS:
        signal.signal(number, signal.SIG_DFL)
    if run.step < stop_at:
        place.say(f"{stop_now.name or 'a signal'}: stopped after step {run.step} of {run.total}; "
                  f"the same command goes on from {out / 'last.pt'}")
    elif run.step < run.total:
        place.say(f"stopped after --steps {run.step} of {run.total}; without --steps the same command goes on")
    else:
        results = run.finish(results)
        place.say(run.table(results))
        if log:
            write_report(run, results)


def check(run, values, bad, saved_step):
    """Raise ValueError, on all ranks, where the run should not go on."""
    config, pairs, path = run.config, run.step * run.config.batch_size, Path(run.config.out) / "last.pt"
    if bad > 20 and bad > config.bad_limit * pairs:  # 20: our choice, for the first steps
        raise ValueError(f"{bad:,} of {pairs:,} pairs were bad, more than --bad-limit {config.bad_limit}: see the "
                         f"warnings above; after python data.py check {' '.join(config.data)} others take their "
                         "places, and the run can go on")
    if run.in_a_row >= 10:  # our choice
        raise ValueError(f"the loss or its gradient was not finite in the last {int(run.in_a_row)} steps up to step "
                         f"{run.step}, which left the weights as they were; the loss terms: {values}; "
                         + (f"the last good checkpoint is {path}" if path.is_file() else "there is no checkpoint yet")
                         + (f" of step {saved_step}" if saved_step and run.place.rank == 0 else ""))  # who saves knows


def evaluations(run, names):
    """Evaluate on the test sets that lie beside a train/ folder.  -> {name: what evaluate.EVALUATIONS[name] gives}"""
    folder, results = Path(run.pairs.sources[0].folder), {}
    for name in names:
        part, evaluation = evaluate.EVALUATIONS[name]
        if folder.name == "train" and (folder.parent / part).is_dir():
            try:
                with torch.compiler.set_stance("force_eager"):  # its shapes are others, and many
                    results[name] = evaluation(run.model, run.tokenizer, folder.parent / part)
            except (OSError, ValueError) as error:  # say, shards of a validation split: no reason to fail a trained run
                run.place.say(f"{name} not evaluated: {error}")
    return results


def report(pairs, results):
    """One table of what `evaluations` gave."""
    lines = [evaluate.table({"": results}) or f"no test sets beside {pairs.sources[0].folder}: see python evaluate.py "
             "--help"]
    unseen = results.get("zeroshot", {}).get("per_class", {})
    if set(data.HELD_OUT) <= set(unseen):
        mean = sum(unseen[name] for name in data.HELD_OUT) / len(data.HELD_OUT)
        lines.append(f"{'':<11}{'never trained':<16}{100 * mean:>6.1f}   top-1 of {', '.join(data.HELD_OUT)}")
    return "\n".join(lines)


def write_report(run, results):
    """results.json and report.html of a run that is done: what goes wrong here is a warning."""
    out = Path(run.config.out)
    try:
        records = evaluate.Records(evaluate.Cache(out / "last.pt"), run.model)
        for task, result in results.items():
            records.add(f"{task} {run.tests()}", result)
        run.draw(results)
        evaluate.report([out], out / "report.html", run.config.root)
        run.place.say(f"report: {out / 'report.html'}")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: of memory for a model on the CPU
        run.place.say(f"warning: {out / 'report.html'} not written: {error}")


def run(config, open_run=open_run):
    """Train as the config says, from the last checkpoint in config.out if there is one; evaluate at the end.

    Raises ValueError, OSError: what was wrong with settings, data, disk, GPU memory or another rank.
    """
    place = join(config.timeout_minutes)
    try:
        opened = open_run(config, place)
        with open_log(opened) as log:
            loop(opened, log)
    except torch.OutOfMemoryError as error:
        less = "--micro-batch, or a smaller one" if hasattr(config, "micro_batch") else "a smaller --batch-size"
        raise ValueError(f"out of GPU memory: give {less}, or --grad-checkpointing "
                         f"({str(error).partition('. ')[0]})") from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise ValueError(f"a loader process ended: {str(error).splitlines()[-1]} (out of memory? fewer --workers "
                             "take less)") from error
        if place.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        lost = lost_ranks(place)
        raise ConnectionError(f"{'lost rank ' + ', '.join(map(str, lost)) if lost else 'lost touch with another rank'} "
                              f"({str(error).splitlines()[0][:200]}); the same command goes on from the last "
                              f"checkpoint in {config.out}") from error


def main(parse=parse, open_run=open_run, name="train.py"):
    """The command line, of downstream/ too."""
    rank, lost = os.environ.get("RANK"), False
    try:
        run(parse(), open_run)
    except (OSError, ValueError) as error:
        lost = isinstance(error, ConnectionError)
        print(f"{name}: {'' if rank is None else f'rank {rank}: '}error: "
              f"{str(error).splitlines()[-1].removeprefix('ValueError: ')}",  # of a loader: the end of its traceback
              file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:  # before the loop, which has its own way to stop
        sys.exit(f"{name}: interrupted before the first step")
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a loader that was killed
        for worker in torch.multiprocessing.active_children():
            worker.kill()  # after an error the loader's are still there, and they ignore SIGTERM
        if lost:
            os._exit(1)  # the end of the process group would wait for the lost rank once more
        if dist.is_initialized():
            gc.collect()  # DDP holds the group; gloo's threads must end before the interpreter does, or they abort it
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
