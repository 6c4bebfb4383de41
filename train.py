"""Pretraining: one plain loop for MaskCLIP and its five baselines (paper, section 4; recipes of SLIP).

    python train.py                                          # MaskCLIP on the drawn demo world, minutes on two cores
    python train.py --data FOLDER_OF_SHARDS --epochs 4       # your own pictures and captions
    torchrun --nproc_per_node=8 train.py --data yfcc15m      # the paper's run

Ideas: nanoGPT (a plain loop, schedules as functions of the step), DINO (teacher outside DDP and the optimiser).
"""
import argparse
import dataclasses
import gc
import json
import math
import os
import re
import signal
import sys
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
from tokenizer import Tokenizer


def flag(default, help):
    """A field of TrainConfig that is a flag on the command line."""
    return field(default=default, metadata=dict(help=help))


@dataclass
class TrainConfig:
    """Everything that fixes a run; saved in each checkpoint.  Defaults are the paper's, or SLIP's CLIP recipe's."""
    data: list = flag(("demo",),
                      "demo, cc3m, cc12m, yfcc15m, or paths of shards, tables, class folders; NAME:2 is taken twice")
    root: str = flag("", "where named data sets lie; else $MASKCLIP_DATA, else ./data")
    out: str = flag("", "folder of this run; else runs/DATA-METHOD")
    method: str = flag("maskclip", ", ".join(models.METHODS))
    model: str = flag("vit_b16", ", ".join(models.PRESETS))
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
    distill_weight: float = flag(0.05, "lambda, weight of masked self-distillation")        # paper
    mlm_weight: float = flag(0.05, "beta, weight of masked language modelling")             # paper
    pixel_weight: float = flag(0.05, "weight of the pixel loss beside CLIP: lambda's place")  # our choice
    simclr_weight: float = flag(1.0, "weight of SimCLR beside CLIP")                        # SLIP
    ema_start: float = flag(0.999, "the teacher's momentum at the first step ...")          # BootMAE
    ema_end: float = flag(0.9999, "... and at the last, linear between")                    # BootMAE
    seed: int = flag(0, "of weights, order, crops and masks")
    precision: str = flag("auto", "fp32 or bf16 (autocast); auto: bf16 on CUDA")
    workers: int = flag(-1, "loader processes per rank; -1: by the number of cores")
    log_every: int = flag(10, "steps between lines of log.jsonl")
    save_minutes: float = flag(20.0, "minutes between checkpoints, beside one per epoch")
    resume: str = flag("", "checkpoint to go on from; else last.pt in --out, where there is one")
    bad_limit: float = flag(0.01, "stop when more than this share of the pairs could not be used")  # our choice
    steps: int = flag(0, "stop after this global step, 0: at the end; the schedules stay those of --epochs")


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
# Settings that do not change what is learned: they may differ when a run goes on.
FREE = ("root", "out", "resume", "workers", "log_every", "save_minutes", "bad_limit", "steps")


def parse(argv=None):
    """The command line -> TrainConfig."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for f in dataclasses.fields(TrainConfig):
        kind = dict(nargs="+") if f.type is list else dict(type=f.type)
        parser.add_argument("--" + f.name.replace("_", "-"), **kind, default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (default: {f.default})")
    return resolve(vars(parser.parse_args(argv)))


def resolve(given):
    """Settings that were given -> TrainConfig: defaults, the data set's recipe, the method's, then what was given.

    Raises ValueError for what cannot be.
    """
    names = given.get("data", ["demo"])
    first = names[0].partition(":")[0]  # without its weight
    recipe = first if first in RECIPES else "demo" if given.get("model", "tiny") == "tiny" else "cc3m"
    of_method = METHOD_RECIPES.get(given.get("method"), {}) if recipe != "demo" else {}
    config = TrainConfig(**{**RECIPES[recipe], **of_method, **given, "data": names})
    for what, allowed in dict(method=models.METHODS, model=models.PRESETS, mask=("block", "random"),
                              precision=("auto", "fp32", "bf16")).items():
        if getattr(config, what) not in allowed:
            raise ValueError(f"unknown --{what} '{getattr(config, what)}': one of {', '.join(allowed)}")
    for low, high, those in ((1, math.inf, ("epochs", "batch_size", "log_every")), (0, math.inf, ("steps", "seed")),
                              (0.01, 0.99, ("mask_ratio",)), (0, 1, ("mlm_ratio",)), (0.01, 1, ("crop_min",))):
        for what in those:
            if not low <= getattr(config, what) <= high:
                raise ValueError(f"--{what.replace('_', '-')} must be at least {low}"
                                 f"{'' if high == math.inf else f' and at most {high}'}, not {getattr(config, what)}")
    config.root = config.root or os.environ.get("MASKCLIP_DATA", "data")
    label = "+".join("-".join(Path(name).resolve().parts[-2:]) if os.sep in name else name for name in names)
    config.out = config.out or f"runs/{re.sub(r'[^-+.=0-9A-Z_a-z]+', '_', label)}-{config.method}"
    return config


# ---------------------------------------------------------------- schedules: pure functions of the step

def learning_rate(step, config, per_epoch):
    """Linear warm-up from 1e-6, then a cosine to 1e-5 (SLIP)."""
    total, warmup = config.epochs * per_epoch, config.warmup_epochs * per_epoch
    if step < warmup:
        return 1e-6 + (config.lr - 1e-6) * step / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1e-5 + (config.lr - 1e-5) * (1 + math.cos(math.pi * share)) / 2


def ema_momentum(step, config, per_epoch):
    """Linear from ema_start to ema_end."""
    return config.ema_start + (config.ema_end - config.ema_start) * min(1.0, step / (config.epochs * per_epoch))


# ---------------------------------------------------------------- one step's loss

def loss_terms(out, batch, teacher_logits, center, patch_size):
    """The loss terms that a method's outputs call for.  -> {name: ()}, unweighted"""
    terms = {}
    if "image" in out:
        terms["image"], terms["text"] = losses.contrastive_loss(out["image"], out["text"], out["scale"])
    if "z1" in out:
        terms["simclr"] = losses.simclr_loss(out["z1"], out["z2"])
    if "pixels" in out:
        hidden = torch.zeros(out["pixels"].shape[:2], dtype=torch.bool, device=out["pixels"].device)
        hidden.scatter_(1, batch["ids_hide"], True)                                    # (B, N)
        terms["pixel"] = losses.pixel_loss(out["pixels"], batch["images"], hidden, patch_size)
    if "student_logits" in out:
        terms["distill"] = losses.distillation_loss(out["student_logits"].flatten(0, 1), teacher_logits.flatten(0, 1),
                                                    center)
    if "mlm_logits" in out:
        terms["mlm"] = losses.mlm_loss(out["mlm_logits"], batch["mlm_targets"])
    return terms


def parameter_groups(model, weight_decay):
    """Matrices decay, and with them (SLIP) positions, class and mask tokens, embeddings and codewords.

    What has fewer than two dimensions does not: biases, norms, the logit scale.
    """
    decay = [p for p in model.parameters() if p.ndim >= 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    return [dict(params=decay, weight_decay=weight_decay), dict(params=other, weight_decay=0.0)]


# ---------------------------------------------------------------- the run

def join():
    """This process's place: torchrun's environment, or alone.  -> rank, world, device"""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def open_pairs(config, rank, world):
    """The pairs of all data sets; rank 0 draws the demo and writes the indices before the others look."""
    if rank > 0:
        dist.barrier()
    pairs = data.Pairs(config.data, config.root)
    if rank == 0 and world > 1:
        dist.barrier()
    if len(pairs) < config.batch_size:
        raise ValueError(f"{len(pairs)} pairs are fewer than one global batch: give --batch-size {len(pairs)} or less")
    if config.batch_size % world:
        raise ValueError(f"--batch-size {config.batch_size} is the global batch: no multiple of {world} ranks")
    return pairs


def make_tokenizer(config, pairs, saved):
    """The checkpoint's tokenizer, or one learned from the first million captions, or CLIP's."""
    if saved:
        return evaluate.saved_tokenizer(saved)
    return Tokenizer.train(pairs.captions(1_000_000), config.vocab_size) if config.vocab_size else Tokenizer.clip()


def save(path, state):
    """Write a checkpoint so that a crash at any moment leaves the old one or the new one, whole."""
    part = path.with_suffix(".partial")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def find_saved(config):
    """The checkpoint that the run goes on from, or None: --resume, else last.pt in --out.

    Raises FileNotFoundError where --resume is missing, ValueError where the settings differ or --out holds another run.
    """
    own = Path(config.out) / "last.pt"
    path = Path(config.resume or own)
    if not config.resume and not path.is_file():
        return None
    if own.is_file() and path.resolve() != own.resolve():
        raise ValueError(f"--resume {path} would overwrite the run in {config.out}: give another --out")
    saved, mine = evaluate.read_checkpoint(path), dataclasses.asdict(config)
    other = [f"--{name.replace('_', '-')} {saved['config'].get(name)} there, {value} now"
             for name, value in mine.items() if name not in FREE and saved["config"].get(name) != value]
    if other:
        raise ValueError(f"{path} was made with other settings ({'; '.join(other)}): give another --out, "
                         "or those settings to go on with it")
    return saved


def open_log(path, step):
    """log.jsonl, opened to go on after `step`: what an interrupted run wrote later is dropped."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
    lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(lines), "utf-8")
    return open(path, "a", encoding="utf-8")


def catch_signals():
    """SIGINT, SIGTERM and SIGUSR1 are noted in the list returned, for the loop to end its step; a later one exits."""
    noted = []

    def handler(number, _):
        # Within two seconds it is the same one: a scheduler tells all processes, and torchrun passes it on to its own.
        if noted and time.monotonic() - noted[0][1] > 2:
            os._exit(128 + number)
        noted.append((signal.Signals(number).name, time.monotonic()))
    for number in data.STOPS:
        signal.signal(number, handler)
    return noted


def any_rank(noted, device):
    """Whether any rank was signalled, on every rank: so all of them stop at the same step."""
    told = torch.tensor(float(len(noted)), device=device)
    dist.all_reduce(told)
    return bool(told)


def run(config):
    """Train as the config says, from the last checkpoint in config.out if there is one; evaluate at the end."""
    rank, world, device = join()
    say = tqdm.write if rank == 0 else lambda text: None
    out, saved = Path(config.out), find_saved(config)
    pairs = open_pairs(config, rank, world)
    for line in pairs.damage:
        say(f"warning: {line}")
    per_epoch, digest = len(pairs) / config.batch_size, pairs.digest()
    if saved and saved["pairs"] != digest:
        raise ValueError(f"the data was another when the checkpoint was made ({saved['pairs']} then, {digest} now), so "
                         "the order would be another: give another --out")
    total = config.epochs * len(pairs) // config.batch_size
    first, stop_at = saved["step"] if saved else 0, min(total, config.steps or total)

    tokenizer = make_tokenizer(config, pairs, saved)
    shape = dataclasses.replace(models.PRESETS[config.model], method=config.method, vocab_size=len(tokenizer))
    torch.manual_seed(config.seed)
    model = models.build(shape).to(device)
    teacher = models.Teacher(model).to(device) if config.method == "maskclip" else None
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), config.lr,
                                  (config.beta1, config.beta2), eps=1e-8, fused=True)  # eps: SLIP recipe
    parts = dict(model=model, optimizer=optimizer) | (dict(teacher=teacher) if teacher else {})
    for name, part in parts.items() if saved else ():
        part.load_state_dict(saved[name])
    student = DistributedDataParallel(model) if world > 1 else model

    samples = data.Samples(pairs, tokenizer, model.needs, config, shape)
    order = data.Order(pairs.sizes, config.seed)
    batches = data.GlobalBatches(order, config.batch_size, first, stop_at, rank, world)
    workers = config.workers if config.workers >= 0 else max(0, min(8, (os.cpu_count() or 1) // world - 1))
    loader = torch.utils.data.DataLoader(samples, batch_sampler=batches, collate_fn=samples.collate,
                                         num_workers=workers, pin_memory=device.type == "cuda",
                                         worker_init_fn=data.ignore_stops)
    bf16 = config.precision == "bf16" or config.precision == "auto" and device.type == "cuda"
    weights = dict(distill=config.distill_weight, mlm=config.mlm_weight)
    if "text" in model.needs:  # beside CLIP; alone they are the whole loss
        weights |= dict(pixel=config.pixel_weight, simclr=config.simclr_weight)

    say(f"{config.method} {config.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{len(tokenizer):,} tokens; {', '.join(config.data)}: {len(pairs):,} pairs; {config.epochs} epochs of "
        f"{per_epoch:.1f} steps; batch {config.batch_size} = {world} x {config.batch_size // world}; "
        f"{'bf16' if bf16 else 'fp32'} on {device.type}\n"
        + " ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items()))
    if saved:
        say(f"going on from step {first} of {config.resume or out / 'last.pt'}")
    noted = catch_signals()
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        log = open_log(out / "log.jsonl", first)
    bar = tqdm(total=stop_at, initial=first, desc=config.method, unit="step", mininterval=1,
               disable=None if rank == 0 else True)  # a bar on a terminal, lines elsewhere
    bad = saved["bad"] if saved and rank == 0 else 0  # the log counts the sum over ranks
    named, saved, step, seen, clock, saved_at = [], None, first, 0, time.time(), time.time()

    for batch in loader:
        lr, momentum = learning_rate(step, config, per_epoch), ema_momentum(step, config, per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for line in batch.pop("bad"):
            bad += 1
            if bad <= 10:
                tqdm.write(f"warning: bad pair, another takes its place: {line}")
                named.append(line)
        batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
        batch |= {name: data.normalize(batch[name]) for name in ("images", "views") if name in batch}

        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            teacher_logits = teacher(batch["images"], batch["ids_hide"]) if teacher else None    # (B, M, K)
            outputs = student(batch)
        terms = loss_terms(outputs, batch, teacher_logits, teacher and teacher.center, shape.patch_size)
        loss = sum(weights.get(name, 1.0) * term for name, term in terms.items())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if "text" in model.needs:
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))  # CLIP
        if teacher:
            models.ema_update(teacher, model, momentum)
            losses.update_center(teacher.center, teacher_logits.flatten(0, 1))
        step, seen = step + 1, seen + config.batch_size
        bar.update()

        log_now, stop = step % config.log_every == 0 or step == stop_at, bool(noted)
        if world > 1:
            stop = log_now and any_rank(noted, device)
        epoch_ends = step * config.batch_size % len(pairs) < config.batch_size
        save_now = stop or step == stop_at or epoch_ends
        if log_now or save_now:  # the only times at which the device is waited for
            sums = torch.stack([*terms.values(), torch.tensor(float(bad), device=device)]).detach()
            if world > 1:
                dist.all_reduce(sums)
            values = dict(zip(terms, (sums[:-1] / world).tolist()))  # each rank's terms are means over its own rows
            if sums[-1] > max(20, config.bad_limit * step * config.batch_size):  # 20: our choice, for the first steps
                raise ValueError(f"{int(sums[-1]):,} of {step * config.batch_size:,} pairs were bad, more than "
                                 f"--bad-limit {config.bad_limit}: see the warnings above; after python data.py check "
                                 f"{' '.join(config.data)} others take their places, and the run can go on")
            if not all(map(math.isfinite, values.values())):
                raise ValueError(f"the loss is not finite at step {step}: {values}; an older {out / 'last.pt'} is good")
        if rank == 0 and log_now:
            if "text" in model.needs:
                values["scale"] = model.logit_scale.exp().item()
            rate = seen / (time.time() - clock)
            log.write(json.dumps(dict(step=step, epoch=step / per_epoch, **values, lr=lr, bad=int(sums[-1]),
                                      **dict(bad_pairs=named) if named else {}, seen_per_s=round(rate, 1))) + "\n")
            log.flush()
            short = " ".join(f"{name} {value:.2f}" for name, value in values.items()) + f" {rate:.0f} pictures/s"
            bar.set_postfix_str(short)
            if bar.disable:
                print(f"step {step}/{stop_at} {short}", flush=True)
            named, seen, clock = [], 0, time.time()
        if rank == 0 and (save_now or log_now and time.time() - saved_at > 60 * config.save_minutes):
            if not all(p.isfinite().all() for p in model.parameters()):
                raise ValueError(f"the weights are not finite at step {step}; an older {out / 'last.pt'} is good")
            save(out / "last.pt", dict(step=step, pairs=digest, bad=int(sums[-1]),
                                       config=dataclasses.asdict(config), model_config=dataclasses.asdict(shape),
                                       tokenizer=[" ".join(pair) for pair in tokenizer.merges],
                                       **{name: part.state_dict() for name, part in parts.items()}))
            saved_at = time.time()
        if stop:
            break
    bar.close()
    for number in data.STOPS:
        signal.signal(number, signal.SIG_DFL)
    if rank == 0:
        log.close()
        if step < stop_at:
            say(f"{noted[0][0] if noted else 'a signal'}: stopped after step {step} of {total}; "
                f"the same command goes on from {out / 'last.pt'}")
        elif step < total:
            say(f"stopped after --steps {step} of {total}; without --steps the same command goes on")
        else:
            report(model.eval(), tokenizer, Path(pairs.sources[0].folder))


def report(model, tokenizer, folder):
    """Print one table of what the test sets that lie beside a train/ folder say of the model."""
    results = {}
    for name, (part, evaluation) in evaluate.EVALUATIONS.items():
        test = folder.parent / part
        if folder.name == "train" and test.is_dir() and ("text" in model.needs) != (name == "linear"):
            try:
                results[name] = evaluation(model, tokenizer, test)
            except (OSError, ValueError) as error:  # say, shards of a validation split: no reason to fail a trained run
                print(f"{name} not evaluated: {error}")
    print(evaluate.table(results) or f"no test sets beside {folder}: see python evaluate.py --help")
    unseen = results.get("zeroshot", {}).get("per_class", {})
    if set(data.HELD_OUT) <= set(unseen):
        mean = sum(unseen[name] for name in data.HELD_OUT) / len(data.HELD_OUT)
        print(f"{'':<11}{'never trained':<16}{100 * mean:>6.1f}   top-1 of {', '.join(data.HELD_OUT)}")


def main():
    """The command line."""
    try:
        run(parse())
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: error: {str(error).splitlines()[-1]}")
    except KeyboardInterrupt:  # before the loop, which has its own way to stop
        sys.exit("train.py: interrupted before the first step")
    finally:
        for worker in torch.multiprocessing.active_children():
            worker.kill()  # after an error the loader's are still there, and they ignore SIGTERM
        if dist.is_initialized():
            gc.collect()  # DDP holds the group; gloo's threads must end before the interpreter does, or they abort it
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
