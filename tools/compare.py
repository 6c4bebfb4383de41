"""The paper's table 1 for runs of train.py, as Markdown: cost and scores, each next to CLIP's.

Runs that differ in the seed alone share a row.  Below are the paper's numbers.  Scores are those
that evaluate.py measured for the weights in last.pt.

    python tools/compare.py runs/clip-0 runs/clip-1 runs/maskclip-0 runs/maskclip-1
"""
import argparse
import json
import math
import sys
from pathlib import Path
from statistics import mean, median, mode, stdev, variance

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluate import file_sha256, read_results
from support.checkpoints import load_checkpoint
from support.runtime import run_program
from support.testsets import prompts
from train import MAY_DIFFER

# Where a test set is, what it is called there, and what was fitted, are no part of a protocol.
NO_PROTOCOL = ("set", "path", "penalty")


def read_run(folder):
    """-> a run's last.pt, its log (list of dicts), the results of exactly these weights

    Raises FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    last = Path(folder, "last.pt")
    if not last.is_file():
        raise FileNotFoundError(f"{folder} has no last.pt: give folders of runs of train.py")
    state = load_checkpoint(last)
    path = Path(folder, "log.jsonl")
    complete = path.read_text("utf-8", "replace").rpartition("\n")[0]  # the last line may be cut
    try:
        log = [json.loads(line) for line in complete.splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged in the line {error.doc[:80]!r}") from error
    sha256 = file_sha256(last)  # results of other weights are those of an earlier epoch
    return state, log, [record for record in read_results(folder) if record["sha256"] == sha256]


def settings_and_numbers(folder):
    """What the table needs of a run.

    -> {setting: text}; {"seed": n, "steps left": n, "memory": GiB, "time": seconds per pair,
    (task, score, protocol): share}, without cost if the log is empty
    """
    state, log, results = read_run(folder)
    config = state.get("config", {})
    if "method" not in config:
        raise ValueError(f"{folder} is no run of train.py: only these are compared")
    settings = {name: str(x) for name, x in config.items() if name not in ("seed", *MAY_DIFFER)}
    settings["data"] += f" ({state['pairs']})"  # runs on different pairs share no row
    numbers = dict(seed=config["seed"])
    if log:
        steps = config["epochs"] * log[-1]["step"] / log[-1]["epoch"]
        numbers["steps left"] = steps - state["step"]
        numbers["memory"] = max(record["memory_gib"] for record in log)
        numbers["time"] = 1 / median(record["pictures_per_s"] for record in log)
    for record in results:
        protocol = {name: x for name, x in record["protocol"].items() if name not in NO_PROTOCOL}
        # The main score is the first one; of retrieval, R@1 of both directions and rSum.
        scores = record["scores"]
        names = list(scores)[:1]
        if record["task"].startswith("retrieval"):
            names = ["i2t R@1", "t2i R@1", "rSum"]
            scores = scores | dict(rSum=sum(scores.values()))
        for name in names:
            numbers[record["task"], name, json.dumps(protocol, sort_keys=True)] = scores[name]
    return settings, numbers


def compare(folders):
    """Runs of train.py, by their folders -> Markdown.  Raises OSError, ValueError."""
    runs = [settings_and_numbers(folder) for folder in folders]
    rows = {}   # {label: {name of a number: those of its runs}}
    for settings, numbers in runs:
        label = settings["method"]  # and as flags what is not the most common setting of the runs
        for name, value in settings.items():
            if name != "method" and value != mode(other[name] for other, _ in runs):
                label += f" --{name.replace('_', '-')} {value}"
        for name, number in numbers.items():
            rows.setdefault(label, {}).setdefault(name, []).append(number)
    clip = next((row for label, row in rows.items() if label.split()[0] == "clip"), {})
    columns = dict.fromkeys(name for _, numbers in runs for name in numbers
                            if isinstance(name, tuple))
    notes = ["a score: mean ± standard deviation over the runs (n - 1), and in brackets that less "
             "CLIP's ± its standard error, sqrt(s1^2 / n1 + s2^2 / n2); rSum: the sum of R@1, 5 "
             "and 10 both ways"]
    if not columns:
        notes = ["no run is evaluated yet: evaluate.py --checkpoint RUN/last.pt ... does it"]
    if not clip:
        notes.append("memory and time are over CLIP's, of which there is no run")
    notes.append("paper: ViT-B/16, YFCC-15M, 25 epochs")
    head = ["", "seeds", "memory", "time"]
    for task, score, protocol in columns:
        head.append(f"{task} {score}")
        if head.count(head[-1]) > 1:  # scores of unlike protocols are never in one column
            notes.append(f"column {len(head)}: the protocol is {protocol}")
    table = [head, ["---"] * len(head)]
    for label, row in rows.items():
        cells = [label, str(len(set(row["seed"])))]
        for name in ("memory", "time"):
            both = name in row and name in clip
            cells.append(f"{mean(row[name]) / mean(clip[name]):.2f}x" if both else "-")
        for column in columns:
            clips = [] if row is clip else clip.get(column, [])
            cells.append(score_cell(row.get(column, []), clips, len(row["seed"])))
        table.append(cells)
        left = max(row.get("steps left", [0]))
        if left >= 1:
            notes.append(f"{label}: a run is not at its end: {left:,.0f} steps are left")
    for method in dict.fromkeys(settings["method"] for settings, _ in runs):
        facts = prompts()["paper"][method]
        cost = facts.get("cost")
        costs = [f"{cost['memory GB']} GB", f"{cost['time']:.2f}x"] if cost else ["-", "-"]
        scores = [str(facts.get(task, {}).get(score, "-")) for task, score, _ in columns]
        table.append([f"paper: {method}", "", *costs, *scores])
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def score_cell(values, clips, n_runs):
    """Shares of a row's runs and of CLIP's -> mean, deviation and difference, per cent"""
    if not values:
        return "-"
    text = f"{100 * mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {100 * stdev(values):.1f}"
        if len(clips) > 1:
            error = math.sqrt(variance(values) / len(values) + variance(clips) / len(clips))
            text += f" ({100 * (mean(values) - mean(clips)):+.1f} ± {100 * error:.1f})"
    return text if len(values) == n_runs else f"{text}, {len(values)} of {n_runs} runs"


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs of train.py")
    args = parser.parse_args()
    run_program("compare.py", lambda: print(compare(args.runs)))


if __name__ == "__main__":
    main()
