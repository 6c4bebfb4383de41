"""The paper's table 1 for runs of train.py, as Markdown: cost and scores, each next to CLIP's.

Runs that differ in the seed alone share a row.  Below are what each row has more than CLIP's, and
the paper's numbers.  Scores are those that evaluate.py measured for the weights in last.pt.

    python tools/compare.py runs/clip-0 runs/clip-1 runs/maskclip-0 runs/maskclip-1
"""
import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.checkpoints import load_checkpoint
from support.results import file_sha256, read_results
from support.runtime import run_program
from support.testsets import prompts

# Settings in which the runs of a row may differ: the seed, and train.MAY_DIFFER.
SAME_ROW = ("seed", "root", "out", "recipe", "micro_batch", "compile", "grad_checkpointing",
            "workers", "steps", "eval_every", "log_every", "resume", "force", "bad_limit",
            "save_minutes", "keep", "timeout_minutes")
# Where a test set is, what it is called there, and what was fitted, are no part of a protocol.
NO_PROTOCOL = ("set", "path", "penalty")


@dataclass
class Run:
    """What the table needs of a run."""
    settings: dict      # {name: text}, "method" among them, without SAME_ROW
    seed: int
    pairs: str          # fingerprint of the data
    steps_left: float
    cost: dict          # {"memory": GiB, "time": seconds per pair}; {} if not measured
    scores: dict        # {(task, score, protocol): share}


def read_run(folder):
    """-> Run.  FileNotFoundError if it has no last.pt, ValueError for damaged files, other runs."""
    last = Path(folder, "last.pt")
    if not last.is_file():
        raise FileNotFoundError(f"{folder} has no last.pt: give folders of runs of train.py")
    state = load_checkpoint(last)
    config = state.get("config", {})
    if "method" not in config:
        raise ValueError(f"{folder} is no run of train.py: only these are compared")
    path = Path(folder, "log.jsonl")
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    complete = text[:text.rfind("\n") + 1]  # the last line of a run may be half written
    try:
        log = [json.loads(line) for line in complete.splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged in the line {error.doc[:80]!r}") from error
    log = [record for record in log if record["step"] <= state["step"]]
    steps_left = config["epochs"] / log[-1]["epoch"] * state["step"] - state["step"] if log else 0
    measured = [record for record in log
                if record.get("pictures_per_s") and record.get("memory_gib")]
    cost = {}
    if measured:
        cost = dict(memory=max(record["memory_gib"] for record in measured),
                    time=1 / statistics.median(record["pictures_per_s"] for record in measured))
    settings = {name: str(x) for name, x in config.items() if name not in SAME_ROW}
    sha256 = file_sha256(last)
    scores = {}
    for record in read_results(folder):
        if record["sha256"] != sha256:  # of an earlier epoch
            continue
        protocol = {name: x for name, x in record["protocol"].items() if name not in NO_PROTOCOL}
        # The main score is the first one; of retrieval, R@1 of both directions.
        names = [name for name in record["scores"] if name.endswith("R@1")]
        for name in names or list(record["scores"])[:1]:
            column = record["task"], name, json.dumps(protocol, sort_keys=True)
            scores[column] = record["scores"][name]
    return Run(settings, config["seed"], state["pairs"], steps_left, cost, scores)


def compare(folders):
    """Runs of train.py, by their folders -> Markdown.  Raises OSError, ValueError."""
    runs = [read_run(folder) for folder in folders]
    rows = {}   # {label: its runs}
    for run in runs:
        rows.setdefault(label_of(run, runs), []).append(run)
    clip = next((row for row in rows.values() if row[0].settings["method"] == "clip"), [])
    notes = ["± of a row: standard deviation over its runs (n - 1); of a difference: standard "
             "error, sqrt(s1^2 / n1 + s2^2 / n2)", "paper: ViT-B/16, YFCC-15M, 25 epochs"]
    columns = list(dict.fromkeys(column for run in runs for column in run.scores))
    head = ["", "seeds", "memory", "time"]
    for task, score, protocol in columns:
        head.append(f"{task} {score}")
        if head.count(head[-1]) > 1:  # scores of unlike protocols are never in one column
            notes.append(f"column {len(head)}: the protocol is {protocol}")
    table = [head, ["---"] * len(head)]
    differences = []
    for label, row in rows.items():
        costs = [cost_cell(row, clip, name) for name in ("memory", "time")]
        cells = [score_cell(row, column) for column in columns]
        table.append([label, str(len({run.seed for run in row})), *costs, *cells])
        if clip and row is not clip:
            cells = [difference_cell(row, clip, column) for column in columns]
            differences.append([f"{label} less CLIP", "", "", "", *cells])
        if len({run.pairs for run in row}) > 1:
            notes.append(f"{label}: the runs saw different data")
    paper = []
    for method in dict.fromkeys(run.settings["method"] for run in runs):
        facts = prompts()["paper"][method]
        cost = facts.get("cost")
        costs = [f"{cost['memory GB']} GB", f"{cost['time']:.2f}x"] if cost else ["-", "-"]
        cells = [str(facts.get(task, {}).get(score, "-")) for task, score, _ in columns]
        paper.append([f"paper: {method}", "", *costs, *cells])
    for folder, run in zip(folders, runs):
        if run.steps_left >= 1:
            notes.append(f"{folder} is not at its end: {run.steps_left:,.0f} steps are left")
    lines = [f"| {' | '.join(cells)} |" for cells in [*table, *differences, *paper]]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def label_of(run, runs):
    """The method, and as flags the settings that are not the most common ones of the runs."""
    flags = ""
    for name, value in run.settings.items():
        if name != "method" and value != statistics.mode(other.settings[name] for other in runs):
            flags += f" --{name.replace('_', '-')} {value}"
    return run.settings["method"] + flags


def cost_cell(row, clip, name):
    """The mean cost of a row's runs as a multiple of CLIP's."""
    if not clip or not all(run.cost for run in [*row, *clip]):
        return "-"
    ours, clips = [statistics.mean(run.cost[name] for run in runs) for runs in (row, clip)]
    return f"{ours / clips:.2f}x"


def score_cell(row, column):
    """Mean and standard deviation over the runs of a row, per cent"""
    values = [run.scores[column] for run in row if column in run.scores]
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    missing = f" ({len(values)} of {len(row)} runs)" if len(values) < len(row) else ""
    return f"{100 * statistics.mean(values):.1f}{spread}{missing}"


def difference_cell(row, clip, column):
    """The row's mean less CLIP's, and its standard error, points"""
    means = []
    square = 0.0
    for runs in (row, clip):
        values = [run.scores[column] for run in runs if column in run.scores]
        if len(values) < 2:
            return "-"
        means.append(statistics.mean(values))
        square += statistics.variance(values) / len(values)
    return f"{100 * (means[0] - means[1]):+.1f} ± {100 * math.sqrt(square):.1f}"


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs of train.py")
    args = parser.parse_args()
    run_program("compare.py", lambda: print(compare(args.runs)))


if __name__ == "__main__":
    main()
