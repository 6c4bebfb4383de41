"""Pictures of a model and of its runs: word maps, masks, codewords, neighbours, curves, a report.

A word map shows how similar each patch is to a word, as the paper's figure does.  The colours are
matplotlib's viridis, and those of Okabe and Ito (2008), which colour-blind readers can tell apart.

    python tools/plots.py heatmap demo          # the first three pictures of a retrieval set
    python tools/plots.py heatmap picture.png "a red star above a blue circle"
    python tools/plots.py codewords picture.png          # also: masks picture.png, neighbours demo
    python tools/plots.py report runs/demo-maskclip runs/demo-clip --out report.html
"""
import argparse
import base64
import io
import itertools
import json
import math
import os
import re
import sys
import textwrap
from html import escape
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluate
from support import testsets
from support.checkpoints import load_checkpoint
from support.runtime import run_program, sentence_of
from support.shards import atomic_write
from tools.compare import read_run

VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
SIDE = 224      # of a picture on a sheet (our choice: 7, 8 and 14 patches divide it)
COLUMNS = 6     # of a sheet (our choice: what a screen holds)
STOP_WORDS = set(  # they name nothing that has a place
    "a an the and or of in on at to with by from into over under is are there its his her their "
    "left right above below picture small large".split())


def sheet(title, rows):
    """A title and rows -> picture.  A row: a text, or [(caption, SIDE x SIDE picture)]."""
    lines = [title]
    for row in rows:
        if isinstance(row, str):
            lines += textwrap.wrap(row, 115)
        else:
            lines += [row[i:i + COLUMNS] for i in range(0, len(row), COLUMNS)]
    heights = [24 if isinstance(line, str) else SIDE + 32 for line in lines]
    columns = max(4, *(len(line) for line in lines if not isinstance(line, str)))
    image = Image.new("RGB", (columns * (SIDE + 8), sum(heights)), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(16)
    top = 0
    for line, height in zip(lines, heights):
        if isinstance(line, str):
            pen.text((0, top), line, "black", font)
        else:
            for i, (caption, picture) in enumerate(line):
                left = i * (SIDE + 8)
                image.paste(picture, (left, top))
                pen.text((left, top + SIDE + 4), caption[:26], "black", font)
        top += height
    return image


def view(path):
    """The middle of a picture file, for a sheet."""
    return data.center_crop(testsets.load_picture(path), SIDE)


def word_maps(model, tokenizer, path, words):
    """How much more a patch looks like each text than like an empty one -> (words, grid, grid)"""
    classifier = evaluate.zeroshot_classifier(model, tokenizer, [*words, ""], ("{}", "a {}"))
    patches = evaluate.encode_images(model.encode_patches, [path], model)[0]            # (N, E)
    maps = classifier @ F.normalize(patches, dim=1).T                               # (words + 1, N)
    maps = maps[:-1] - maps[-1]
    return maps.view(-1, model.config.grid, model.config.grid).numpy()


def phrases(caption):
    """The words of a caption that STOP_WORDS and punctuation divide: ["red star", "blue circle"]"""
    parts = [[]]
    for word in re.findall(r"[\w'-]+|[^\w\s]", caption.lower()):
        if word in STOP_WORDS or not word[0].isalnum():
            parts.append([])
        else:
            parts[-1].append(word)
    return list(dict.fromkeys(" ".join(part) for part in parts if part))


def heatmap(model, tokenizer, pairs):
    """Maps of the phrases of each pair (path of a picture, caption)."""
    rows = []
    for path, caption in pairs:
        words = phrases(caption)
        if not words:
            raise ValueError(f"heatmap finds no word to look for in {caption!r}")
        picture = view(path)
        row = [(Path(path).name, picture)]
        for word, values in zip(words, word_maps(model, tokenizer, path, words)):
            smooth = np.array(Image.fromarray(values).resize(picture.size, Image.BICUBIC))
            level = (smooth - values.min()) / (values.max() - values.min() + 1e-9)
            level = level.clip(0, 1) * (len(VIRIDIS) - 1)
            colours = [np.interp(level, range(len(VIRIDIS)), channel) for channel in VIRIDIS.T]
            colours = Image.fromarray(np.stack(colours, -1).astype(np.uint8))
            row.append((word, Image.blend(picture, colours, 0.7)))
        rows += [caption, row]
    return sheet("Where the words are, from blue (lowest of a map) to yellow (highest)", rows)


def mask_sheet(paths, grid, ratio):
    """What masks of grid x grid patches hide from the student."""
    rows = []
    for i, path in enumerate(paths):
        picture = view(path)
        grey = Image.new("RGB", picture.size, "#c8c8c8")
        row = [(Path(path).name, picture)]
        masks = dict(block=data.block_mask((grid, grid), ratio, np.random.default_rng(i)),
                     random=data.random_mask(grid ** 2, ratio, np.random.default_rng(i)))
        for kind, mask in masks.items():
            hidden = Image.fromarray(mask.reshape(grid, grid)).resize(picture.size, Image.NEAREST)
            row.append((f"{kind} mask", Image.composite(grey, picture, hidden)))
        rows.append(row)
    return sheet(f"Masks of {ratio:.0%} of {grid} x {grid} patches", rows)


def codeword_sheet(model, paths):
    """The student's most likely codeword of each patch."""
    if model.config.method != "maskclip":
        raise ValueError(f"{model.config.method} has no codewords: give a checkpoint of MaskCLIP")
    grid = model.config.grid

    def encode(images):
        return model.codewords(model.visual(images)[:, 1:]).argmax(-1)                  # (B, N)
    ids = evaluate.encode_images(encode, paths, model).long().view(-1, grid, grid).numpy()
    counts = np.bincount(ids.flatten(), minlength=model.config.codewords)
    colours = np.full((len(counts), 3), 200, np.uint8)
    for codeword, colour in zip(np.argsort(-counts, kind="stable"), OKABE_ITO):
        colours[codeword] = ImageColor.getrgb(colour)
    row = []
    for path, picture_ids in zip(paths, ids):
        drawn = Image.fromarray(colours[picture_ids]).resize((SIDE, SIDE), Image.NEAREST)
        row += [(Path(path).name, view(path)), ("its codewords", drawn)]
    return sheet(f"Codewords: {np.count_nonzero(counts)} of {len(counts):,} occur here; the "
                 f"{len(OKABE_ITO)} most frequent have colours, the others are grey", [row])


def neighbour_sheet(model, tokenizer, folder):
    """Five texts, spread evenly over a retrieval set, their pictures, and what is nearest."""
    paths, texts, picture_of_text = testsets.karpathy(folder)
    images = F.normalize(evaluate.encode_images(model.encode_image, paths, model), dim=1)
    similarity = images @ evaluate.encode_texts(model, tokenizer, texts).T      # (pictures, texts)
    rows = []
    for text in np.linspace(0, len(texts) - 1, 5).astype(int).tolist():
        picture = picture_of_text[text]
        rows.append(f"{texts[text]}: its picture, the nearest pictures, the texts nearest to it")
        nearest = similarity[:, text].argsort(descending=True)[:COLUMNS - 1].tolist()
        rows.append([(f"{similarity[i, text]:.2f}", view(paths[i])) for i in [picture, *nearest]])
        for i in similarity[picture].argsort(descending=True)[:COLUMNS - 1].tolist():
            rows.append(f"{similarity[picture, i]:.2f}  {texts[i]}")
    return sheet(f"Nearest neighbours in {folder}, with cosine similarities", rows)


# ---------------------------------------------------------------- curves and the report of runs

def curves(logs):
    """Each value that changes over the steps -> SVG.  logs: {run: records of its log.jsonl}"""
    colours = dict(zip(logs, itertools.cycle(OKABE_ITO)))
    records = [record for log in logs.values() for record in log]
    last_step = max((record["step"] for record in records), default=0)
    out = [f'<text x="20" y="{18 + 16 * i}" fill="{colours[run]}">{escape(run)}</text>'
           for i, run in enumerate(logs)]
    top = 16 * len(logs)
    n_panels = 0
    for name in dict.fromkeys(name for record in records for name in record):
        lines = {run: [(record["step"], record[name]) for record in log
                       if isinstance(record.get(name), (int, float))]
                 for run, log in logs.items()}
        values = [value for points in lines.values() for _, value in points]
        low = min(values, default=0)
        high = max(values, default=0)
        if low == high or name in ("step", "epoch"):
            continue
        out.append(f'<g transform="translate({n_panels % 3 * 380} {top + n_panels // 3 * 180})">'
                   f'<text x="20" y="36">{name}, {low:.3g} to {high:.3g}, until step {last_step:,}'
                   '</text><path d="M20 44V170H360" fill="none" stroke="#ccc"/>')
        for run, points in lines.items():
            path = [f"{20 + 340 * step / last_step:.1f},"
                    f"{170 - 126 * (value - low) / (high - low):.1f}"
                    for step, value in points[::len(points) // 1000 + 1]]  # no more than pixels
            out.append(f'<polyline points="{" ".join(path)}" fill="none" stroke="{colours[run]}"/>')
        out.append("</g>")
        n_panels += 1
    height = top + 180 * math.ceil(n_panels / 3)
    return "\n".join(['<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" '
                      f'font-size="12" width="1140" viewBox="0 0 1140 {height}">'
                      '<rect width="100%" height="100%" fill="white"/>', *out, "</svg>"])


def pictures_of(folder, config, root):
    """Word maps, masks and codewords of three test pictures of a run's data -> sheets."""
    name = config["data"][0].partition(":")[0]
    test_set = Path(name).parent / "val"  # of the shards in ANY/train
    if not test_set.is_dir():
        test_set = evaluate.find(name, root, "val")
    pairs = first_pairs(test_set)
    paths = [path for path, _ in pairs]
    model, tokenizer = evaluate.load_model(Path(folder, "last.pt"))
    if tokenizer:
        yield heatmap(model, tokenizer, pairs)
    if model.config.method == "maskclip":
        yield mask_sheet(paths, model.config.grid, config["mask_ratio"])
        yield codeword_sheet(model, paths)


def first_pairs(folder):
    """The first three pictures of a retrieval set, each with its first text."""
    paths, texts, picture_of_text = testsets.karpathy(folder)
    return [(path, texts[picture_of_text.index(i)]) for i, path in enumerate(paths[:3])]


def report(folders, path, root="data"):
    """Write one HTML page on runs, and curves.svg next to it.  Raises OSError, ValueError."""
    results = {}
    logs = {}
    methods = []
    parts = []
    for folder in map(str, folders):
        state, logs[folder], records = read_run(folder)
        results[folder] = {record["task"]: record for record in records}
        methods.append(state["model_config"]["method"])
        settings = json.dumps([state["config"], state["made_by"][-1]], indent=1)
        parts.append(f"<h2>{escape(folder)}</h2><pre>{escape(settings, False)}</pre>")
        try:
            for image in pictures_of(folder, state["config"], root):
                content = io.BytesIO()
                image.save(content, "PNG")
                code = base64.b64encode(content.getvalue()).decode()
                parts.append(f'<img width="1140" src="data:image/png;base64,{code}" alt=""/>')
        except (OSError, ValueError) as error:  # of the test pictures: the rest is still of use
            parts.append(f"<p>No pictures: {escape(sentence_of(error))}</p>")
    scores = evaluate.table(results, methods) or "Nothing is evaluated yet: see evaluate.py --help"
    svg = curves(logs)
    page = ['<html lang="en"><head><meta charset="utf-8"/><title>Report</title></head><body>',
            f"<h2>Scores, per cent</h2><pre>{escape(scores)}</pre>", svg, *parts, "</body></html>"]
    for file, text in ((path, "\n".join(page)), (Path(path).with_name("curves.svg"), svg)):
        with atomic_write(file) as out:
            out.write(text.encode())


# ---------------------------------------------------------------- the command line

def draw(what, names, checkpoint, root):
    """The sheet `what` of picture files, or of one retrieval set under root."""
    model, tokenizer = evaluate.load_model(checkpoint)
    if what == "masks":
        config = load_checkpoint(checkpoint).get("config", {})
        return mask_sheet(names, model.config.grid, config.get("mask_ratio", 0.75))  # paper
    if what == "codewords":
        return codeword_sheet(model, names)
    if tokenizer is None:
        raise ValueError(f"{what} needs a text encoder, which {checkpoint} does not have")
    if what == "heatmap" and len(names) == 1 and Path(names[0]).is_file():
        raise ValueError(f"heatmap {names[0]}: give the words to look for after the picture")
    if what == "heatmap" and len(names) > 1:
        return heatmap(model, tokenizer, [(path, names[-1]) for path in names[:-1]])
    folder = evaluate.find(names[0], root, "val")
    if what == "heatmap":
        return heatmap(model, tokenizer, first_pairs(folder))
    return neighbour_sheet(model, tokenizer, folder)


def run(args):
    """What the command line asks for, as a file."""
    if args.what == "report":
        out = args.out or Path(args.names[0], "report.html")
        report(args.names, out, args.root)
    else:
        out = args.out or f"{args.what}.png"
        checkpoint = args.checkpoint or evaluate.newest_checkpoint()
        with atomic_write(out) as file:
            draw(args.what, args.names, checkpoint, args.root).save(file, "PNG")
    print(f"wrote {out}")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=("heatmap", "masks", "codewords", "neighbours", "report"))
    parser.add_argument("names", nargs="+", help="pictures, for heatmap with a caption at the end; "
                        "heatmap, neighbours: a retrieval set; report: runs")
    parser.add_argument("--checkpoint", help="else the newest one under runs/")
    parser.add_argument("--root", default=os.environ.get("MASKCLIP_DATA", "data"),
                        help="the folder of named data sets")
    parser.add_argument("--out", help="file to write; else WHAT.png, or report.html in the run")
    args = parser.parse_args()
    run_program("plots.py", lambda: run(args))


if __name__ == "__main__":
    main()
