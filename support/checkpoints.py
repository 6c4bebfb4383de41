"""Checkpoints: what is in one, which one a run resumes from, and how it reaches the disk.

A run's folder holds last.pt (replaced at each save), epoch-N.pt and best.pt.  A crash at any moment
leaves each of them as it was, or complete.
"""
import argparse
import dataclasses
import os
import pickle
import re
import shutil
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from support.runtime import Log, print0

# What torch.load raises on files that are damaged or of another kind.
DAMAGED = (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, ValueError, TypeError,
           AttributeError, struct.error, OSError, zipfile.BadZipFile)


@dataclass
class Progress:
    """What a run counts; saved in each checkpoint."""
    skipped: torch.Tensor   # steps without an update, because loss or gradient was not finite ...
    in_a_row: torch.Tensor  # ... and how many of them were the last ones
    step: int = 0           # steps done
    bad: int = 0            # unusable pairs of this rank; rank 0 adds those before a resume
    best: float = 0.0       # highest score of --eval-every
    bad_names: list = field(default_factory=list)  # for the next line of the log, not saved

    def note_bad_pairs(self, lines):
        """Count unusable pairs; the first ten are named here and in the log."""
        for line in lines:
            self.bad += 1
            if self.bad <= 10:
                print(f"warning: bad pair, another takes its place: {line}", flush=True)
                self.bad_names.append(line)

    def count(self, finite):
        """One more step.  finite () bool on the device, for which nobody waits here."""
        self.step += 1
        self.skipped += ~finite
        self.in_a_row = (self.in_a_row + 1) * ~finite


def checkpoint_state(modules, progress, bad, facts):
    """All that a checkpoint holds: tensors, numbers, strings.

    modules: {name: what has a state_dict}; bad: unusable pairs of all ranks; facts: constants
    """
    counts = dict(step=progress.step, bad=bad, best=progress.best, skipped=progress.skipped.cpu(),
                  in_a_row=progress.in_a_row.cpu())
    states = {name: module.state_dict() for name, module in modules.items()}
    return counts | facts | states


def restore(saved, modules, progress, ranks):
    """Resume from what checkpoint_state gave.

    No state of random numbers is in it: all that is drawn in a step depends on the seed and the
    step, or the pair, alone.
    """
    for name, module in modules.items():
        if saved.get(name):  # the scaler's is empty but in fp16
            module.load_state_dict(saved[name])
    progress.step = saved["step"]
    progress.bad = saved["bad"] if ranks.rank == 0 else 0
    progress.best = saved["best"]
    progress.skipped.copy_(saved["skipped"])
    progress.in_a_row.copy_(saved["in_a_row"])


def check_ranks_agree(step, fingerprint, ranks):
    """Raise ValueError if the ranks start from different steps or data."""
    if ranks.world_size == 1:
        return
    starts = [None] * ranks.world_size
    dist.all_gather_object(starts, (step, fingerprint), ranks.host_group)
    if len(set(starts)) > 1:
        raise ValueError(f"the ranks start from different steps or data ({starts}): --out and the "
                         "data must be the same folders on all nodes")


# ---------------------------------------------------------------- from the disk

def load_checkpoint(path):
    """A file of torch.save as a dict, without running any code in it.

    Raises FileNotFoundError (or another OSError of the file itself); ValueError if it is damaged,
    is no checkpoint, or would run code.
    """
    try:
        # A Namespace only holds attributes; SLIP, MAE and timm save their arguments in one.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        if isinstance(error, OSError) and error.filename:
            raise
        lines = str(error).splitlines() or [""]
        asked = [line for line in lines if "unsupported global" in line.lower()]
        what = "would run code, which is refused" if asked else "is not a checkpoint, or is damaged"
        reason = (asked or lines)[0].strip()[:150]
        raise ValueError(f"{path} {what} ({type(error).__name__}: {reason})") from error
    return state if isinstance(state, dict) else {}


def find_checkpoint(out, resume="", force=False):
    """The checkpoint from which a run resumes: --resume, else last.pt in --out.  -> state, path

    None, None if there is none.  If last.pt comes from the same --resume already, it is that one.
    Raises FileNotFoundError if --resume is missing; ValueError if the checkpoint is damaged, --out
    holds other checkpoints only, or (without force) --resume would overwrite the run in --out.
    """
    last = Path(out) / "last.pt"
    path = Path(resume or last)
    others = ", ".join(map(str, sorted(set(Path(out).glob("*.pt")) - {last})))
    if not resume and not last.is_file():
        if others:
            raise ValueError(f"{out} holds {others} but no last.pt: --resume one of them, or give "
                             "another --out")
        return None, None
    if last.is_file() and path.resolve() != last.resolve():
        if _resumed_from(last) == resume:
            path = last
        elif not force:
            raise ValueError(f"--resume {path} would overwrite the run in {out}: give another "
                             "--out, or --force to take this one back to it")
    try:
        return load_checkpoint(path), path
    except ValueError as error:
        hint = f"; older checkpoints are {others}: --resume one of them with --force"
        raise ValueError(f"{error}{hint if others else ''}") from error


def _resumed_from(path):
    """The --resume of the run that wrote a checkpoint; "" if it is damaged."""
    try:
        return load_checkpoint(path).get("config", {}).get("resume", "")
    except ValueError:
        return ""


def check_same_run(state, path, config, fingerprint, may_differ, fixed):
    """Raise ValueError unless a checkpoint belongs to the run that config describes.

    fingerprint: of the data.  may_differ: settings that do not change what is learned.  fixed:
    settings that must agree even with --force, because they set shapes of weights or count steps.
    """
    now = dataclasses.asdict(config)
    if "pairs" not in state or state["config"].keys() - now.keys():
        raise ValueError(f"{path} is of another kind of run, or of an older version: give another "
                         "--out (it can be evaluated, and another run can start from its weights)")
    then = dataclasses.asdict(type(config)()) | state["config"]
    differing = [name for name in now if name not in may_differ and then[name] != now[name]]
    never = [name for name in differing if name in fixed]
    if never or differing and not config.force:
        shown = "; ".join(f"--{name.replace('_', '-')} {then[name]} there, {now[name]} now"
                          for name in never or differing)
        way_out = "" if never else ", those settings to resume it, or --force to use the new ones"
        raise ValueError(f"{path} was made with other settings ({shown}): give another --out"
                         f"{way_out}")
    if state["pairs"] != fingerprint and not config.force:
        raise ValueError(f"the data was different when {path} was made ({state['pairs']} then, "
                         f"{fingerprint} now), so the order would be another: give another --out, "
                         "or --force to resume all the same")


# ---------------------------------------------------------------- to the disk

def save_checkpoint(out, state, names=()):
    """Write out/last.pt, and the same file under further names.

    At any moment each of them is the old one or complete.  Raises OSError, e.g. of a full disk.
    """
    partial = Path(out) / "last.partial"
    link = Path(out) / "link.partial"
    partial.unlink(missing_ok=True)  # after a crash it may be a second name of an older checkpoint
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {partial}: {error.__context__ or error}") from error
    for name in names:
        link.unlink(missing_ok=True)
        try:
            os.link(partial, link)  # one file under two names takes no room
        except OSError:  # a file system without hard links
            shutil.copyfile(partial, link)
        os.replace(link, Path(out) / name)
    os.replace(partial, Path(out) / "last.pt")


def prune_checkpoints(out, epoch, keep):
    """Delete the checkpoints of epochs but the last `keep`.

    Later ones go too: they are of a run that was taken back to an older checkpoint.
    """
    for file in Path(out).glob("epoch-*.pt"):
        number = re.fullmatch(r"epoch-(\d+)\.pt", file.name)
        if number and not epoch - keep < int(number[1]) <= epoch:
            file.unlink()


def open_log(out, stateful, progress, facts, source):
    """The log, cut to where the run stands.

    A run that resumes from elsewhere is saved here first: from then on this is where it stands.
    """
    log = Log(out)
    if source and source.resolve() != (Path(out) / "last.pt").resolve():
        save_checkpoint(out, checkpoint_state(stateful, progress, progress.bad, facts))
    log.truncate(progress.step)
    return log


def try_save(out, state, names, log, must):
    """Write the log's lines, then the checkpoint.  -> whether it is saved

    A full disk is a warning, or OSError if it `must` succeed.
    """
    try:
        log.flush(to_disk=True)
        save_checkpoint(out, state, names)
        return True
    except OSError as error:
        if must:
            raise
        files = ", ".join(["last.pt", *names])
        print0(f"warning: step {state['step']} is not saved ({files}), the run continues: {error}")
        return False
