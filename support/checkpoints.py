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
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.distributed as dist

from support.runtime import Log, print0, safe_print, sentence_of

# What torch.load raises on files that are damaged or of another kind.
DAMAGED = (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, ValueError, TypeError,
           AttributeError, struct.error, OSError, zipfile.BadZipFile, zlib.error)
# What training scripts put next to weights: their arguments, paths, numpy's numbers.
_scalar = np.float64(0).__reduce__()[0]
PLAIN = [argparse.Namespace, np.dtype, *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
         *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
         *((PurePosixPath, f"pathlib.{module}{kind}") for module in ("", "_local.")
           for kind in ("PosixPath", "WindowsPath"))]
MOST_PICKLED = 2 ** 28  # our choice, in bytes: what is no tensor


@dataclass
class Progress:
    """What a run counts; saved in each checkpoint."""
    skipped: torch.Tensor   # steps without an update, because loss or gradient was not finite ...
    in_a_row: torch.Tensor  # ... and how many of them were the last ones
    step: int = 0           # steps done
    bad: int = 0            # unusable pairs of this rank; rank 0 adds those before a resume
    best: float = 0.0       # highest score of --eval-every
    bad_names: list = field(default_factory=list)  # for the next line of the log

    def note_bad_pairs(self, lines):
        """Count unusable pairs; the first ten of each rank are named here and in the log."""
        for line in lines:
            self.bad += 1
            if self.bad <= 10:
                safe_print(f"warning: bad pair, another takes its place: {line}")
                self.bad_names.append(line)

    def gather_names(self, ranks):
        """Hand the names of bad pairs to rank 0, which logs and saves them."""
        if ranks.world_size > 1:
            names = [None] * ranks.world_size
            dist.all_gather_object(names, self.bad_names, ranks.host_group)
            self.bad_names = sum(names, []) if ranks.rank == 0 else []

    def count(self, finite):
        """One more step.  finite () bool on the device, for which nobody waits here."""
        self.step += 1
        self.skipped += ~finite
        self.in_a_row = (self.in_a_row + 1) * ~finite


def checkpoint_state(modules, progress, bad, facts):
    """All that a checkpoint holds: tensors, numbers, strings.

    modules: {name: what has a state_dict}; bad: unusable pairs of all ranks; facts: constants
    """
    counts = dict(step=progress.step, bad=bad, bad_names=progress.bad_names, best=progress.best,
                  skipped=progress.skipped.cpu(), in_a_row=progress.in_a_row.cpu())
    states = {name: module.state_dict() for name, module in modules.items()}
    return counts | facts | states


def restore(saved, source, modules, progress, ranks):
    """Resume from what checkpoint_state gave.  ValueError: a part is missing or of another kind.

    No state of random numbers is in it: all that is drawn in a step depends on the seed and the
    step, or the pair, alone.
    """
    try:
        for name, module in modules.items():
            if saved[name]:  # the scaler's is empty but in fp16
                module.load_state_dict(saved[name])
        progress.step = saved["step"]
        if ranks.rank == 0:
            progress.bad = saved["bad"]
            progress.bad_names = list(saved["bad_names"])
        progress.best = saved["best"]
        progress.skipped.copy_(saved["skipped"])
        progress.in_a_row.copy_(saved["in_a_row"])
    except (LookupError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{source} has a part that is missing or does not fit "
                         f"({type(error).__name__}: {sentence_of(error)[:200]})") from error


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

    Raises FileNotFoundError (or another OSError of the file itself); ValueError if it is damaged
    (torch.load does not look at the checksums), is no checkpoint, or would run code.
    """
    with open(path, "rb") as file:
        return load_state(file, path)


def load_state(file, path):
    """load_checkpoint of an open file.  path: what messages call it"""
    try:
        check_archive(file)
        file.seek(0)
        with torch.serialization.safe_globals(PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a pickle's protocol
            state = torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        lines = str(error).splitlines() or [""]
        asked = [line for line in lines if "unsupported global" in line.lower()]
        what = "is not a checkpoint, or is damaged"
        if asked or "Unsupported operand" in str(error):  # the latter: a pickle, not of torch.save
            what = "would run code, or could, which is refused"
        reason = (asked or lines)[0].strip()[:150]
        raise ValueError(f"{path} {what} ({type(error).__name__}: {reason})") from error
    return state if isinstance(state, dict) else {}


def check_archive(file):
    """Raise ValueError if a record of an open zip has another checksum, or its pickle is huge."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if record.filename.endswith(".pkl") and record.file_size > MOST_PICKLED:
                raise ValueError(f"{record.filename} in it has {record.file_size:,} bytes")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the checksum of {damaged} in it is another one")


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
    parts = dict(pairs=str, config=dict, model_config=dict, made_by=list, step=int)
    if (any(not isinstance(state.get(name), kind) for name, kind in parts.items())
            or state["config"].keys() - now.keys()):
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
    """The log, cut to where the run stands.  ValueError: it is of a run whose last.pt is gone.

    A run that begins, or resumes from elsewhere, is saved first: from then on it stands here.
    """
    log = Log(out)
    if not source and log.path.stat().st_size:
        raise ValueError(f"{out} holds the log of a run, log.jsonl, but no last.pt: give another "
                         "--out, or move the log away")
    if not source or source.resolve() != (Path(out) / "last.pt").resolve():
        save_checkpoint(out, checkpoint_state(stateful, progress, progress.bad, facts))
    log.truncate(progress.step)
    return log


def try_save(out, state, names, log, must):
    """Write the log's lines, then the checkpoint.  -> whether it is saved

    A full disk is a warning, or an error if it `must` succeed.  Nothing is saved, and so no older
    checkpoint deleted, while step after step is not finite.
    """
    usual = 9 if state["scaler"] else 1  # fp16 halves its scale until the gradient is finite
    if state["in_a_row"] > usual or not all(x.isfinite().all() for x in state["model"].values()):
        sentence = (f"step {state['step']} is not saved, because the last losses or gradients, or "
                    "a weight, are not finite")
        if must:
            raise ValueError(sentence)
        print0(f"warning: {sentence}")
        return False
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
