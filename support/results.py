"""Results: as a table next to the paper's numbers, and in results.jsonl next to a checkpoint.

A result is what an evaluation of evaluate.py returns; a record of results.jsonl holds in addition
of which weights it is, and by which code.
"""
import dataclasses
import hashlib
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL
import torch

from support.testsets import prompts
from support.weights import weights_file


def table(columns, methods=()):
    """{checkpoint: {task: result}} -> text: a line per score in per cent, a column per checkpoint.

    methods: of each checkpoint, for the paper's numbers, which get a column if there are any.
    """
    rows = {}   # {(task, score): a result that has it}, because a checkpoint may lack some
    for results in columns.values():
        for task, result in results.items():
            rows |= {(task, score): result for score in result["scores"]}
    indent = 2 + max((len(task) for task, _ in rows), default=0)
    lines = [" " * (indent + 16)]
    ends = [""]
    notes = []
    for (task, score), result in rows.items():
        if score == next(iter(result["scores"])):
            lines.append(f"{task:<{indent}}{score:<16}")
            ends.append(f"   chance {100 * result['chance']:.1f}; {result['over']}")
            notes += [f"  {task}: {note}" for note in result.get("notes", ())]
        else:
            lines.append(f"{'':<{indent}}{score:<16}")
            ends.append("")
    heads = []
    for i, (label, results) in enumerate(columns.items()):
        shares = [results.get(task, {}).get("scores", {}).get(score) for task, score in rows]
        ours = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
        paper = prompts()["paper"].get(methods[i], {}) if methods else {}
        theirs = [str(paper.get(task, {}).get(score, "")) for task, score in rows]
        for head, texts in ((label, ours), ("paper", theirs)):
            if any(texts):
                heads.append(head)
                width = max(8, len(head) + 2)
                lines = [line + x.rjust(width) for line, x in zip(lines, [head, *texts])]
    lines = [(line + end).rstrip() for line, end in zip(lines, ends)]
    if "paper" in heads:
        deit = " (DeiT: ImageNet-1K, 300)" if "deit" in methods else ""
        notes.append(f"  paper: ViT-B/16, YFCC-15M, 25 epochs{deit}")
    return "\n".join((lines if len(heads) > 1 else lines[1:]) + notes)


def provenance():
    """What numbers come from: the commit of this code ("" outside git) and versions.  -> dict"""
    folder = str(Path(__file__).resolve().parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git
        commit = ""
    return dict(commit=commit, python=platform.python_version(), torch=str(torch.__version__),
                numpy=np.__version__, pillow=PIL.__version__)


def file_sha256(checkpoint):
    """By it a result stays that of its weights when training replaces last.pt."""
    with open(weights_file(checkpoint), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_result(checkpoint, model, task, result, sha256=""):
    """Append one line to results.jsonl; if it cannot be written, that is a warning."""
    file = weights_file(checkpoint)
    path = file.parent / "results.jsonl"
    record = dict(task=task, checkpoint=file.name, sha256=sha256 or file_sha256(file), **result,
                  model=dataclasses.asdict(model.config), model_notes=getattr(model, "notes", []),
                  date=time.strftime("%Y-%m-%d %H:%M:%S"), **provenance())
    record.pop("per_class", None)   # a thousand numbers for ImageNet
    try:
        with open(path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
    except OSError as error:
        print(f"warning: {path} is not written: {error}", file=sys.stderr)


def read_results(folder):
    """The records of folder/results.jsonl, [] without one.  ValueError names a damaged line.

    Of the same weights, task and protocol the last one counts.
    """
    path = Path(folder, "results.jsonl")
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            protocol = json.dumps(record["protocol"], sort_keys=True)
            records[record["sha256"], record["task"], protocol] = record
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"line {number} of {path} is cut off, or is no result of evaluate.py: "
                             "delete it, or move the file away") from error
    return list(records.values())
