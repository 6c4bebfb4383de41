"""Pretraining: one plain loop for MaskCLIP and its five baselines (paper, section 4).

    python train.py                                       # the drawn demo world, minutes
    python train.py --data FOLDER_OF_SHARDS --recipe cc3m
    torchrun --nproc_per_node=8 train.py --data yfcc15m   # the full run

The loop is `train`, below; read it first.  Ideas: nanoGPT (a plain loop, schedules as functions of
the step), DINO (a teacher outside DDP and the optimiser), GradCache (a contrastive batch in parts),
SLIP (recipes).
"""
import dataclasses
import math
import os
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import losses
import model as models
from support.checkpoints import (Progress, check_ranks_agree, check_same_run, checkpoint_state,
                                 find_checkpoint, open_log, prune_checkpoints, restore, try_save)
from support.demo import HELD_OUT
from support.runtime import (Meter, SignalHandler, autocast, init_distributed, on_rank0, print0,
                             rank0_first, run_program, sync_gradients)
from support.settings import check_ranges, flag, parse_flags
from support.weights import read_weights, take_weights
from tokenizer import Tokenizer

# ---------------------------------------------------------------- settings

@dataclass
class TrainConfig:
    """Everything that fixes a run; saved in each checkpoint.

    Defaults are for large data.  A path without --recipe or --model gets the demo's recipe.
    """
    data: list = flag(("demo",), "demo, cc3m, cc12m, yfcc15m, folders of shards; NAME:2 is twice")
    recipe: str = flag("", "demo, cc3m, cc12m or yfcc15m; else that of --data's name, else demo")
    root: str = flag("", "where named data sets lie; else $MASKCLIP_DATA, else ./data")
    out: str = flag("", "folder of this run; else runs/DATA-METHOD")
    method: str = flag("maskclip", ", ".join(models.METHODS))
    model: str = flag("vit_b16", ", ".join(models.PRESETS))
    init: str = flag("", "start from these weights: ours, CLIP's, open_clip's, a timm or MAE ViT's")
    epochs: int = flag(25, "passes over the data")                                       # paper
    batch_size: int = flag(4096, "GLOBAL batch in pairs, whatever the number of GPUs")   # paper
    micro_batch: int = flag(0, "pairs of a rank computed at a time (GradCache); 0: all")
    lr: float = flag(5e-4, "peak learning rate")                                         # SLIP
    weight_decay: float = flag(0.5, "of matrices; biases and norms have none")           # SLIP
    vocab_size: int = flag(0, "entries to learn from the captions; 0: CLIP's vocabulary")
    mask: str = flag("block", "block or random: which patches are hidden")               # ours
    mask_ratio: float = flag(0.75, "share of the patches that is hidden")                # paper
    codewords: int = flag(0, "K of the online tokenizer; 0: the model's")
    distill_weight: float = flag(1.0, "lambda, of masked self-distillation")  # ours; paper: 0.05
    mlm_weight: float = flag(0.05, "beta, of masked language modelling")                 # paper
    ema_start: float = flag(0.999, "momentum of the teacher at the first step ...")      # BootMAE
    ema_end: float = flag(0.9999, "... and at the last; linear between")                 # BootMAE
    precision: str = flag("auto", "fp32, bf16 or fp16 (loss scaled); auto: bf16 on CUDA")
    compile: bool = flag(False, "compile the transformer blocks")
    grad_checkpointing: bool = flag(False, "compute blocks twice: less memory")
    seed: int = flag(0, "of weights, order, crops and masks")
    workers: int = flag(-1, "loader processes per rank; -1: by the number of cores")
    steps: int = flag(0, "stop after this step; the schedules stay those of --epochs")
    eval_every: int = flag(0, "epochs between evaluations (best.pt is the best); 0: at the end")
    log_every: int = flag(10, "steps between lines of log.jsonl")
    resume: str = flag("", "checkpoint to resume from; else last.pt in --out if it is there")
    force: bool = flag(False, "resume although settings or data differ")

    # Constants: no flag, because nobody has needed one.  Recipes may change them.
    warmup_epochs: float = 1.0      # SLIP recipe, linear from 1e-6
    beta1: float = 0.9              # SLIP recipe
    beta2: float = 0.98             # SLIP recipe
    crop_min: float = 0.5           # SLIP recipe: smallest share of the picture in a random crop
    mlm_ratio: float = 0.2          # paper: share of a caption's tokens that is masked
    pixel_weight: float = 0.05      # our choice for CLIP+MAE: the paper's lambda
    simclr_weight: float = 1.0      # SLIP, where it stands next to the MEAN of L_I and L_T
    depth: int = 0                  # blocks of the image tower; 0: the model's (paper: 12)
    text_decoder_depth: int = -1    # -1: the model's (paper: 4)
    grad_clip: float = math.inf     # largest norm of the gradient; SLIP's recipe has no limit
    bad_limit: float = 0.01         # our choice: stop if a larger share of the pairs is unusable
    save_minutes: float = 20.0      # our choice: between checkpoints, in addition to one per epoch
    keep: int = 2                   # our choice: checkpoints of whole epochs that are kept
    timeout_minutes: float = 10.0   # PyTorch's for NCCL: how long a rank waits for another


RECIPES = dict(
    # Our choice: two CPU cores, about 600 steps.  The crop keeps small objects smaller than large
    # ones.  Random masks, because blocks of 75 % of 8 x 8 patches leave only the border visible,
    # from which nobody can tell what is drawn in the middle.
    demo=dict(model="tiny", epochs=2, batch_size=64, lr=1e-3, weight_decay=0.1, warmup_epochs=0.2,
              crop_min=0.7, vocab_size=2048, mask="random", ema_start=0.99, ema_end=0.99),
    cc3m=dict(epochs=40),      # SLIP
    cc12m=dict(epochs=35),     # SLIP
    yfcc15m=dict(epochs=25),   # paper
)
# What a baseline changes in the recipes for large data.
METHOD_RECIPES = dict(
    slip=dict(lr=3e-3, weight_decay=0.1),                                # SLIP
    simclr=dict(lr=3.2e-3, weight_decay=0.1),                            # SLIP
    mae=dict(lr=2.4e-3, weight_decay=0.05, beta2=0.95, crop_min=0.2),    # MAE: 1.5e-4 for 256
)
# Settings that do not change what is learned, and may differ when a run resumes.
MAY_DIFFER = ("root", "out", "recipe", "micro_batch", "compile", "grad_checkpointing", "workers",
              "steps", "eval_every", "log_every", "resume", "force", "bad_limit", "save_minutes",
              "keep", "timeout_minutes")
# Settings that a run keeps even with --force: they set the shapes of weights, count steps, or are
# part of the optimiser's state.
FIXED = ("method", "model", "vocab_size", "init", "batch_size", "depth", "codewords",
         "text_decoder_depth", "weight_decay", "beta1", "beta2")
LARGE = 200_000  # our choice: more pairs without a recipe are taken for a mistake


def make_config(given):
    """-> TrainConfig: defaults, the recipe's, the method's, then what was given.  ValueError."""
    names = given.get("data", ["demo"])
    first = names[0].partition(":")[0]  # without its weight
    implied = first if first in RECIPES else ""
    if not implied and "model" in given:
        implied = "demo" if given["model"] == "tiny" else "cc3m"
    name = given.get("recipe", implied)
    if name not in ("", *RECIPES):
        raise ValueError(f"unknown --recipe '{name}': one of {', '.join(RECIPES)}")
    settings = RECIPES[name or "demo"]
    if name not in ("", "demo"):
        settings = settings | METHOD_RECIPES.get(given.get("method"), {})
    config = TrainConfig(**settings | given | dict(data=names, recipe=name))
    choices = dict(method=models.METHODS, model=models.PRESETS, mask=("block", "random"))
    check_ranges(config, choices, [
        (0, 10 ** 6, ("micro_batch", "codewords", "vocab_size", "depth", "keep")),
        (1 if config.method == "mae" else 2, math.inf, ("batch_size",)),  # others compare pairs
        (0, math.inf, ("distill_weight", "mlm_weight")),
        (0, 1, ("ema_start", "ema_end", "mlm_ratio")), (0.01, 0.99, ("mask_ratio",))])
    if "text" not in models.METHODS[config.method].needs:
        config.pixel_weight = config.simclr_weight = 1.0  # MAE and SimCLR: the only loss
    config.root = config.root or os.environ.get("MASKCLIP_DATA", "data")
    config.out = config.out or f"runs/{data_label(names)}-{config.method}"
    if Path(config.out).exists() and not Path(config.out).is_dir():
        raise ValueError(f"--out {config.out} is not a folder")
    return config


def data_label(names):
    """A name for a run's folder, of the data's names or of the last two parts of their paths."""
    parts = ["-".join(Path(name).resolve().parts[-2:]) if os.sep in name else name
             for name in names]
    return re.sub(r"[^-+.=0-9A-Z_a-z]+", "_", "+".join(parts))


# ---------------------------------------------------------------- schedules: functions of the step

def learning_rate(step, config, steps_per_epoch, lowest=1e-5):
    """Linear warm-up from 1e-6, then a cosine to `lowest` (SLIP's 1e-5)."""
    total = config.epochs * steps_per_epoch
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return 1e-6 + (config.lr - 1e-6) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return lowest + (config.lr - lowest) * (1 + math.cos(math.pi * progress)) / 2


def ema_momentum(step, config, steps_per_epoch):
    """Linear from ema_start to ema_end."""
    progress = min(1.0, step / (config.epochs * steps_per_epoch))
    return config.ema_start + (config.ema_end - config.ema_start) * progress


# ---------------------------------------------------------------- the losses of a pass

def masked_losses(out, batch, teacher_logits, teacher, counts):
    """The losses of the masked pass: means over hidden patches, masked words of the GLOBAL batch.

    teacher_logits (B, M, K) or None; counts: as global_counts gives them
    -> {"distill", "mlm", "pixel"}: (), unweighted; 0.0 for those that the method does not have
    """
    terms = dict(distill=0.0, mlm=0.0, pixel=0.0)
    if "student_logits" in out:  # row k of both is the same hidden patch: both follow ids_hide
        student_logits = out["student_logits"].flatten(0, 1)                            # (B * M, K)
        teacher_logits = teacher_logits.flatten(0, 1)                                   # (B * M, K)
        terms["distill"] = losses.distillation_loss(student_logits, teacher_logits, teacher.center,
                                                    denominator=counts["hidden"])
    if "mlm_logits" in out:
        terms["mlm"] = losses.mlm_loss(out["mlm_logits"], batch["mlm_targets"], counts["words"])
    if "pixels" in out:
        hidden = torch.zeros(out["pixels"].shape[:2], dtype=torch.bool, device=out["pixels"].device)
        hidden.scatter_(1, batch["ids_hide"], True)                                     # (B, N)
        patch_size = math.isqrt(out["pixels"].size(2) // 3)
        terms["pixel"] = losses.pixel_loss(out["pixels"], batch["images"], hidden, patch_size,
                                           denominator=counts["hidden"])
    return terms


def contrastive_losses(out):
    """The losses that compare the pairs of the GLOBAL batch with one another.

    -> {"image", "text", "simclr"}: (), unweighted; 0.0 for those that the pass does not have
    """
    terms = dict(image=0.0, text=0.0, simclr=0.0)
    if "image" in out:
        terms["image"], terms["text"] = losses.contrastive_loss(out["image"], out["text"],
                                                                out["scale"])
    if "z1" in out:
        terms["simclr"] = losses.simclr_loss(out["z1"], out["z2"])
    return terms


# ---------------------------------------------------------------- a batch in parts

def split(batch, n_parts):
    """A batch -> its n_parts parts of equal size, in order."""
    parts = [{} for _ in range(n_parts)]
    for name, x in batch.items():
        if name not in ("mlm_ids", "mlm_targets"):
            for part, piece in zip(parts, x.chunk(n_parts)):
                part[name] = piece
    if "mlm_ids" in batch:  # positions in the flattened (B, L): each part counts from its start
        size = batch["tokens"].numel() // n_parts
        for i, part in enumerate(parts):
            inside = batch["mlm_ids"] // size == i
            part["mlm_ids"] = batch["mlm_ids"][inside] - i * size
            part["mlm_targets"] = batch["mlm_targets"][inside]
    return parts


def to_device(part, device):
    """Tensors on the device; pixels normalised there, because uint8 is a quarter to send."""
    part = {name: x.to(device, non_blocking=True) for name, x in part.items()}
    for name in part.keys() & {"images", "views"}:
        part[name] = data.normalize(part[name])
    return part


def global_counts(parts, device):
    """How many hidden patches and masked words the GLOBAL batch has.  -> {"hidden", "words"}: ()

    A rank or part may have more masked words than another, so a mean of their means would be wrong.
    """
    counts = {}
    for name, ids in (("hidden", "ids_hide"), ("words", "mlm_ids")):
        if ids in parts[0]:
            count = sum(part[ids].numel() for part in parts)
            counts[name] = losses.all_sum(torch.full((), float(count), device=device))
    return counts


def gradcache_features(model, parts, name, amp):
    """GradCache, first half (Gao et al. 2021): a pass's features of all parts, without activations.

    The losses need the features of all pairs at once; backward() leaves their gradients in .grad.
    For deterministic passes only, because each is computed twice.  -> {name: (B, D), a leaf}
    """
    with torch.no_grad(), amp:
        pieces = [model(part, [name], project=False) for part in parts]
    return {key: torch.cat([piece[key] for piece in pieces]).requires_grad_() for key in pieces[0]}


def gradcache_backward(student, parts, name, features, amp, sync):
    """GradCache, second half: each part again, with activations, and its features' gradient.

    What model.project has used (logit scale, SimCLR's head) has its gradient in .grad already; DDP
    averages it in the last part's backward pass, with find_unused_parameters.
    """
    gradients = {key: x.grad.chunk(len(parts)) for key, x in features.items()}
    for i, part in enumerate(parts):
        with sync_gradients(student, sync and i == len(parts) - 1):
            with amp:
                again = student(part, [name], project=False)
            torch.autograd.backward(list(again.values()), [gradients[key][i] for key in again])


# ---------------------------------------------------------------- what a run is made of

def open_pairs(config, ranks):
    """The pairs of all data sets; rank 0 draws the demo and writes the indices first.

    Raises ValueError if they, the batch, the recipe and the ranks do not go together.
    """
    pairs = rank0_first(lambda: data.Pairs(config.data, config.root), ranks)
    for line in pairs.warnings:
        print0(f"warning: {line}")
    if not config.recipe:
        if len(pairs) > LARGE:
            raise ValueError(f"{len(pairs):,} pairs and neither --recipe nor --model: give "
                             "--recipe yfcc15m, cc12m or cc3m (ViT-B/16), or demo for a toy model")
        print0("no --recipe and no --model: the recipe is demo, a toy model for a laptop")
    if len(pairs) < config.batch_size:
        raise ValueError(f"{len(pairs)} pairs are fewer than one global batch: give --batch-size "
                         f"{len(pairs)} or less")
    share, rest = divmod(config.batch_size, ranks.world_size)
    if rest:
        raise ValueError(f"--batch-size {config.batch_size} is the global batch: it is not a "
                         f"multiple of {ranks.world_size} ranks")
    if share % min(config.micro_batch or share, share):
        raise ValueError(f"--micro-batch {config.micro_batch} does not divide {share}, a rank's "
                         "share of the batch")
    return pairs


def make_tokenizer(config, pairs, saved):
    """The tokenizer of a checkpoint, or one learned from the first million captions, or CLIP's."""
    if saved and "tokenizer" in saved:
        return Tokenizer(line.split(" ") for line in saved["tokenizer"])
    if config.vocab_size:
        return Tokenizer.train(pairs.captions(1_000_000), config.vocab_size)
    return Tokenizer.clip()


def make_model(config, vocab_size, saved=None, init=None):
    """The model of a checkpoint (its weights come later), or a fresh one, or one with --init's.

    init: as read_weights gives it.  Raises ValueError if its weights do not fit.
    """
    if saved:
        return models.build(models.ModelConfig(**saved["model_config"]))
    torch.manual_seed(config.seed)
    shape = models.PRESETS[config.model]
    changes = dict(method=config.method, vocab_size=vocab_size, depth=config.depth or shape.depth,
                   codewords=config.codewords or shape.codewords)
    if config.text_decoder_depth >= 0:
        changes["text_decoder_depth"] = config.text_decoder_depth
    if not init:
        return models.build(dataclasses.replace(shape, **changes))
    for name in ("quick_gelu", "pre_norm", "patch_bias", "image_norm_eps"):
        changes[name] = getattr(init["config"], name)
    model = models.build(dataclasses.replace(shape, **changes))
    print0(take_weights(model, init, f"--init {config.init}"))
    return model


def parameter_groups(model, weight_decay):
    """Matrices decay, and with them (SLIP) positions, class and mask tokens, embeddings, codewords.

    What has fewer than two dimensions does not: biases, norms, the logit scale.
    """
    decay = [p for p in model.parameters() if p.ndim >= 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    return [dict(params=decay, weight_decay=weight_decay), dict(params=other, weight_decay=0.0)]


def announce(config, model, tokenizer, pairs, ranks, precision, progress, source):
    """Say what begins: sizes, what follows from the settings, and all settings."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print0(f"{config.method} {config.model}, {parameters:.1f} M parameters, {len(tokenizer):,} "
           f"tokens; {', '.join(config.data)}: {len(pairs):,} pairs; {config.epochs} epochs of "
           f"{len(pairs) / config.batch_size:.1f} steps; batch {config.batch_size} = "
           f"{ranks.world_size} x {config.batch_size // ranks.world_size}; {precision} on "
           f"{ranks.device.type}")
    print0(" ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items()))
    if source:
        print0(f"resumes from step {progress.step} of {source}")


# ---------------------------------------------------------------- what a step leaves for the log

def add_terms(terms, more):
    """Add the loss terms of a part, those that the method has, without their graphs."""
    for name, term in more.items():
        if torch.is_tensor(term):
            terms[name] = terms.get(name, 0) + term.detach()


def epoch_at(step, last_step, n_pairs, config):
    """-> the number of epochs done, and whether this step ends one"""
    epoch, pairs_since = divmod(step * config.batch_size, n_pairs)
    if step == last_step:
        return config.epochs, True  # the last step may end short of the last pairs
    return epoch, pairs_since < config.batch_size


def evaluation_due(epoch, config):
    """Whether --eval-every asks for an evaluation after this epoch."""
    return config.eval_every > 0 and (epoch % config.eval_every == 0 or epoch == config.epochs)


def means_over_ranks(terms, features, progress, ranks):
    """-> {loss term, accuracy: mean over the ranks}, their bad pairs.  Waits for the device."""
    values = dict(terms)
    if features:
        values["accuracy"] = losses.contrastive_accuracy(features["image"], features["text"])
    bad = torch.tensor(float(progress.bad), device=ranks.device)
    *sums, bad = losses.all_sum(torch.stack([*values.values(), bad])).tolist()
    if bad:
        progress.gather_names(ranks)
    return dict(zip(values, (x / ranks.world_size for x in sums))), int(bad)


def check_health(config, progress, values, bad):
    """Raise ValueError, on all ranks, if the run should not continue."""
    pairs = progress.step * config.batch_size
    if bad > 20 and bad > config.bad_limit * pairs:  # 20: our choice, for the first steps
        raise ValueError(f"{bad:,} of {pairs:,} pairs were bad, more than a share of "
                         f"{config.bad_limit}: python tools/prepare.py check names them, and pack "
                         "writes shards without them")
    if progress.in_a_row >= 10:  # our choice
        raise ValueError(f"the loss or its gradient was not finite in 10 steps up to step "
                         f"{progress.step}, which changed no weight; terms: {values}; the last "
                         f"good checkpoint is {Path(config.out) / 'last.pt'}")


def teacher_statistics(teacher, momentum, parts, amp):
    """Whether the targets collapse, on the last batch of all ranks; {} without a teacher.

    -> ema; codeword_entropy of the mean distribution (nats, at most log K); codewords_used: how
    many are the most likely one of some hidden patch
    """
    if not teacher:
        return {}
    use = 0
    for part in parts:
        with amp:
            logits = teacher(part["images"], part["ids_hide"]).flatten(0, 1)            # (B * M, K)
        use = use + losses.codeword_use(logits, teacher.center)
    distribution, used = losses.all_sum(use)                                            # each (K,)
    entropy = torch.special.entr(distribution / distribution.sum()).sum()
    return dict(ema=momentum, codeword_entropy=entropy.item(),
                codewords_used=int((used > 0).sum()))


# ---------------------------------------------------------------- evaluation of a run

def evaluate_run(model, tokenizer, pairs, names):
    """Evaluate on the test sets that lie next to a train/ folder.  -> {task: result}"""
    folder = Path(pairs.sources[0].folder)
    results = {}
    for name in names:
        subfolder, evaluation = evaluate.EVALUATIONS[name]
        if folder.name == "train" and (folder.parent / subfolder).is_dir():
            try:
                with torch.compiler.set_stance("force_eager"):  # its shapes are others, and many
                    results[name] = evaluation(model, tokenizer, folder.parent / subfolder)
            except (OSError, ValueError) as error:  # no reason to end a trained run
                print0(f"{name} is not evaluated: {error}")
    return results


def finish(config, model, tokenizer, pairs, results):
    """Evaluate a run that is complete, print one table, append the scores to results.jsonl."""
    folder = Path(pairs.sources[0].folder).resolve()
    wanted = ("zeroshot", "retrieval", "dense") if "text" in model.needs else ("linear",)
    missing = [name for name in wanted if name not in results]
    results = results | evaluate_run(model, tokenizer, pairs, missing)
    print0(evaluate.table({"": results}) or "no test sets next to a folder train/: docs/data.md")
    unseen = results.get("zeroshot", {}).get("per_class", {})
    if set(HELD_OUT) <= set(unseen):
        mean = sum(unseen[name] for name in HELD_OUT) / len(HELD_OUT)
        print0(f"{'':<11}{'never trained':<16}{100 * mean:>6.1f}   top-1 of {', '.join(HELD_OUT)}")
    last = Path(config.out) / "last.pt"
    sha256 = evaluate.file_sha256(last)
    for task, result in results.items():
        evaluate.append_result(last, model, f"{task} {folder.parent.name}", result, sha256)
    print0(f"pictures and curves: python tools/plots.py report {config.out}")


# ---------------------------------------------------------------- the loop

def train(config):
    """Train, from the last checkpoint in config.out if there is one.  ValueError, OSError."""
    ranks = init_distributed(config.timeout_minutes)
    out = Path(config.out)
    device = ranks.device
    pairs = open_pairs(config, ranks)
    saved, source = find_checkpoint(out, config.resume, config.force)
    if saved:
        check_same_run(saved, source, config, pairs.fingerprint, MAY_DIFFER, FIXED)
    init = read_weights(config.init) if config.init and not saved else None
    tokenizer = make_tokenizer(config, pairs, saved or init)
    model = make_model(config, len(tokenizer), saved, init).to(device)
    teacher = models.Teacher(model).to(device) if config.method == "maskclip" else None
    networks = dict(model=model, teacher=teacher) if teacher else dict(model=model)
    for network in networks.values():
        models.set_up_blocks(network, config.grad_checkpointing, config.compile)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), config.lr,
                                  (config.beta1, config.beta2), eps=1e-8, fused=True)  # SLIP recipe
    amp, scaler, precision = autocast(config.precision, device)
    stateful = networks | dict(optimizer=optimizer, scaler=scaler)
    progress = Progress(torch.zeros((), device=device), torch.zeros((), device=device))
    if saved:
        restore(saved, source, stateful, progress, ranks)
    check_ranks_agree(progress.step, pairs.fingerprint, ranks)

    share = config.batch_size // ranks.world_size
    n_parts = share // min(config.micro_batch or share, share)
    student = model
    if ranks.world_size > 1:
        several = len(model.passes) > 1 or n_parts > 1
        student = DistributedDataParallel(model, find_unused_parameters=several)
    steps_per_epoch = len(pairs) / config.batch_size
    last_step = config.epochs * len(pairs) // config.batch_size
    stop_at = min(last_step, config.steps or last_step)
    samples = data.Samples(pairs, tokenizer, model.needs, config, model.config)
    batches = iter(data.make_loader(samples, pairs.sizes, config.seed, config.batch_size,
                                    progress.step, stop_at, ranks, config.workers, samples.collate))
    made_by = [*(saved["made_by"] if saved else []), evaluate.provenance()]  # one a start
    facts = dict(pairs=pairs.fingerprint, config=dataclasses.asdict(config),
                 model_config=dataclasses.asdict(model.config), made_by=made_by,
                 tokenizer=[" ".join(pair) for pair in tokenizer.merges])
    announce(config, model, tokenizer, pairs, ranks, precision, progress, source)
    log = open_log(out, stateful, progress, facts, source) if ranks.rank == 0 else None
    signals = SignalHandler(ranks)
    meter = Meter(config.batch_size, stop_at)
    watched = "zeroshot" if "text" in model.needs else "linear"  # what --eval-every evaluates
    evaluation = partial(evaluate_run, model, tokenizer, pairs, [watched])
    results = {}
    stop = False
    saved_at = time.time()

    while progress.step < stop_at and not stop:
        lr = learning_rate(progress.step, config, steps_per_epoch)
        momentum = ema_momentum(progress.step, config, steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = meter.next(batches)
        progress.note_bad_pairs(batch.pop("bad"))
        parts = [to_device(part, device) for part in split(batch, n_parts)]
        counts = global_counts(parts, device)

        # Each pass goes forward and back before the next one: only one holds its activations.
        optimizer.zero_grad(set_to_none=True)
        terms, features, teacher_means = {}, {}, []
        for name in model.passes:
            last = name == model.passes[-1]
            if name == "masked":
                for i, part in enumerate(parts):
                    with sync_gradients(student, last and i == n_parts - 1):
                        with amp:  # the teacher sees all patches, the student the visible ones
                            target = teacher(part["images"], part["ids_hide"]) if teacher else None
                            masked = student(part, ["masked"])
                        L = masked_losses(masked, part, target, teacher, counts)
                        loss = (config.distill_weight * L["distill"]      # lambda L_Dist
                                + config.mlm_weight * L["mlm"]            # + beta L_MLM
                                + config.pixel_weight * L["pixel"])       # CLIP+MAE, MAE
                        scaler.scale(loss).backward()
                    add_terms(terms, L)
                    if teacher:
                        teacher_means.append(target.flatten(0, 1).mean(0, dtype=torch.float32))
                masked = target = L = loss = None  # 1.2 GiB of logits (ViT-B/16, batch 256)
            else:  # "contrastive": full images and captions; "views": SimCLR's two views
                with sync_gradients(student, last and n_parts == 1):
                    if n_parts > 1:
                        cached = gradcache_features(model, parts, name, amp)
                    with amp:
                        full = model.project(cached) if n_parts > 1 else student(parts[0], [name])
                    L = contrastive_losses(full)
                    loss = L["image"] + L["text"] + config.simclr_weight * L["simclr"]  # L_I + L_T
                    scaler.scale(loss).backward()
                if n_parts > 1:
                    gradcache_backward(student, parts, name, cached, amp, last)
                add_terms(terms, L)
                features |= {key: full[key].detach() for key in ("image", "text") if key in full}

        # DDP has averaged the gradient, so all ranks see the NaN of one.  Such a step changes no
        # weight, moment, teacher or centre (in fp16 the scaler sets a found_inf of its own).
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        finite = norm.isfinite()
        optimizer.found_inf = (~finite).float()
        scaler.step(optimizer)
        scaler.update()
        if "text" in model.needs:
            model.logit_scale.data.clamp_(0, math.log(100))  # CLIP
        if teacher:
            models.ema_update(teacher, model, momentum, finite)
            losses.update_center(teacher.center, torch.stack(teacher_means), finite=finite)
        progress.count(finite)

        stop = signals.stop_requested()
        epoch, epoch_ends = epoch_at(progress.step, last_step, len(pairs), config)
        evaluate_now = epoch_ends and evaluation_due(epoch, config)
        log_now = progress.step % config.log_every == 0 or progress.step == stop_at or evaluate_now
        overdue = log_now and time.time() - saved_at > 60 * config.save_minutes
        save_now = epoch_ends or progress.step == stop_at or stop or overdue
        if log_now or save_now:  # only here the device is waited for
            values, bad = means_over_ranks(terms, features, progress, ranks)
            check_health(config, progress, values, bad)
        if log_now:
            record = dict(step=progress.step, epoch=progress.step / steps_per_epoch, **values)
            record |= meter.read(progress.step, values)
            record |= teacher_statistics(teacher, momentum, parts, amp)
            record |= dict(scale=model.logit_scale.exp().item()) if features else {}
            record |= dict(lr=lr, grad_norm=norm.item(), skipped=int(progress.skipped), bad=bad,
                           bad_pairs=progress.bad_names, loss_scale=scaler.get_scale())
            results = on_rank0(evaluation, ranks) if evaluate_now else {}
            if log:
                log.write(record | evaluate.main_scores(results))
            progress.bad_names = []
            meter.restart()
        if save_now and log:
            best = max([progress.best, *evaluate.main_scores(results).values()])
            names = [f"epoch-{epoch}.pt"] if epoch_ends and config.keep else []
            names += ["best.pt"] if best > progress.best else []
            progress.best = best
            state = checkpoint_state(stateful, progress, bad, facts)
            must = stop or progress.step == stop_at
            if try_save(out, state, names, log, must) and epoch_ends:
                prune_checkpoints(out, epoch, config.keep)
            saved_at = time.time()

    signals.restore()
    if progress.step == last_step:
        on_rank0(lambda: finish(config, model, tokenizer, pairs, results), ranks)
    else:
        print0(f"{signals.reason(stop)}: stopped after step {progress.step} of {last_step}; the "
               f"same command{'' if stop else ' without --steps'} resumes from {out / 'last.pt'}")
    if log:
        log.close()


def main():
    """The command line."""
    run_program("train.py", lambda: train(make_config(
        parse_flags(TrainConfig, __doc__.splitlines()[0], recipes=RECIPES))))


if __name__ == "__main__":
    main()
