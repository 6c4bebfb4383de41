"""Drawing, from numbers and PIL pictures alone: sheets, colour scale, curves, the report of runs and their table.

evaluate.py computes, this draws: no model, no tensor, nothing of ours but the writing of files.  Colours are told apart
by colour-blind eyes (Okabe and Ito 2008; matplotlib's viridis), and what a colour says, a shape or a word says too.
Sheets are joined from pictures beside and below one another; curves and report are plain SVG and HTML: no script, no
font, no address outside the file.
"""
import base64
import collections
import io
import json
import math
import statistics
from bisect import bisect_right
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tokenizer import write_atomically

# Five colours of matplotlib's viridis, dark to light: legible in grey too.
VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], float)
OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
GREY, GAP = "#b4b4b4", 8


# ---------------------------------------------------------------- contact sheets

def font(size, words):
    """Pillow's own typeface knows ASCII; for other words one of the system's, where there is one (else boxes)."""
    for name in () if words.isascii() else ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def wrapped(words, face, width):
    """Words in lines of at most `width` pixels -> list of str; a word longer than a line is broken."""
    lines = [""]
    for word in words.split() if words else ():
        while face.getlength(word) > width and len(word) > 1:
            cut = max(1, bisect_right(range(1, len(word)), width, key=lambda n: face.getlength(word[:n])))
            lines += [word[:cut]]
            word = word[cut:]
        line = f"{lines[-1]} {word}".strip()
        lines[len(lines) - (face.getlength(line) <= width):] = [line if face.getlength(line) <= width else word]
    return lines if lines[0] else lines[1:] or lines


def text(words, width, size=16, least=1, most=12, fill="black", ground="white"):
    """Words as a picture `width` wide: from `least` to `most` lines, "..." for what is beyond."""
    words = words[:2000]
    face = font(size, words)
    lines = wrapped(words, face, width)
    lines = [*lines[:most - 1], "..."] if len(lines) > most else lines
    height = round(1.32 * size)
    image = Image.new("RGB", (width, height * max(least, len(lines))), ground)
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((0, i * height), line, fill, face)
    return image


def card(words, side):
    """A sentence where a picture could stand, as large as fits above the tick of `ticked`."""
    room, high = side - 32, side - 56
    for size in (17, 14, 12):
        if len(wrapped(words[:2000], font(size, words), room)) * 1.32 * size <= high:
            break
    image = Image.new("RGB", (side, side), "#f1f1ee")
    image.paste(text(words, room, size, most=int(high / 1.32 / size), ground="#f1f1ee"), (16, 16))
    return image


def beside(parts, gap=GAP, down=False):
    """Pictures in a row, or one below the other, on white."""
    axis, place = int(down), [0, 0]
    size = [max(part.size[a] for part in parts) for a in (0, 1)]
    size[axis] = sum(part.size[axis] + gap for part in parts) - gap
    image = Image.new("RGB", size, "white")
    for part in parts:
        image.paste(part, tuple(place))
        place[axis] += part.size[axis] + gap
    return image


def sheet(title, rows, legend=None):
    """A title, rows and what explains them.  -> picture

    rows: a str is a heading; else a list of (caption, picture), each caption above its picture, in its width.
    legend: a picture, or words.
    """
    wide = max(sum(picture.width + GAP for _, picture in row) - GAP for row in rows if not isinstance(row, str))
    width, parts = max(wide, 454), []
    for row in rows:
        if isinstance(row, str):
            parts.append(text(row, width, 18))
        else:
            tall = max(text(caption, picture.width).height for caption, picture in row) // 21  # lines of 16 pixels
            parts.append(beside([beside([text(caption, picture.width, least=tall), picture], 3, down=True)
                                 for caption, picture in row]))
    parts += [text(legend, width) if isinstance(legend, str) else legend] * (legend is not None)
    return ImageOps.expand(beside([text(title, width, 20), *parts], down=True), GAP, "white")


def save(image, path):
    """Write a picture file, whole or not at all; the format is the suffix's, else PNG."""
    content = io.BytesIO()
    kinds = Image.registered_extensions()
    image.save(content, kinds.get(Path(path).suffix.lower(), "PNG"), optimize=True)
    write_atomically(Path(path), content.getvalue())


def coloured(share):
    """Values from 0 to 1 -> RGB picture in VIRIDIS."""
    place = share.clip(0, 1) * (len(VIRIDIS) - 1)
    channels = [np.interp(place, range(len(VIRIDIS)), channel) for channel in VIRIDIS.T]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def colour_scale(low, high):
    """What the darkest and the lightest colour mean."""
    low, high = (text(words, int(font(16, words).getlength(words)) + 4) for words in (low, high))
    return beside([low, coloured(np.tile(np.linspace(0, 1, 160), (16, 1))), high])


def word_rows(name, picture, words, maps, columns=7):
    """A picture and a map for each word, in rows of at most `columns`.  maps (words, rows, columns) -> rows of `sheet`

    Each map runs from its own lowest to its own highest value, which are printed.
    """
    panels = [(name, picture)]
    for word, values in zip(words, maps, strict=True):
        low, high = values.min(), values.max()
        shown = np.array(Image.fromarray(values).resize(picture.size, Image.BICUBIC))
        panels.append((f"{word}  ({low:+.2f} to {high:+.2f})",
                       Image.blend(picture, coloured((shown - low) / (high - low + 1e-9)), 0.7)))
    columns = -(-len(panels) // -(-len(panels) // columns))  # rows of like length
    return [panels[i:i + columns] for i in range(0, len(panels), columns)]


def veiled(picture, mask, blank=False):
    """The picture with the patches of mask (rows, columns) bool faded and hatched, or blank; patches' edges drawn."""
    y, x = np.mgrid[:picture.height, :picture.width]
    veil = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "#e4e4e4"), 0.8)
    veil = Image.new("RGB", picture.size, "#f1f1f1") if blank else veil
    veil.paste("#bcbcbc", mask=Image.fromarray((x + y) % 7 == 0).convert("L"))
    picture = picture.copy()
    picture.paste(veil, mask=Image.fromarray(mask).convert("L").resize(picture.size, Image.NEAREST))
    return ruled(picture, mask.shape)


def ruled(picture, grid):
    """White lines between the patches of grid (rows, columns)."""
    pen = ImageDraw.Draw(picture)
    for k in range(1, grid[0]):
        pen.line([(0, k * picture.height // grid[0]), (picture.width, k * picture.height // grid[0])], "white")
    for k in range(1, grid[1]):
        pen.line([(k * picture.width // grid[1], 0), (k * picture.width // grid[1], picture.height)], "white")
    return picture


def mask_row(name, picture, masks, trained):
    """A picture, each mask over it, and what the student sees with the mask `trained`.  -> a row of `sheet`

    masks: {name: (rows, columns) bool}, True = hidden from the student
    """
    row = [(name, picture)]
    for kind, mask in masks.items():
        row.append((f"{kind} mask: {mask.sum()} of {mask.size} hidden", veiled(picture, mask)))
    mask = masks[trained]
    return [*row, (f"the student sees {(~mask).sum()} of {mask.size}", veiled(picture, mask, blank=True))]


def codeword_sheet(pictures, ids, total, columns=3):
    """Pictures beside their patches, coloured by codeword: the most frequent get colours, the others grey.

    pictures: [(name, picture)]; ids (n, rows, columns) int, the most likely codeword of each patch; total: K
    """
    colours, cells = most_frequent(ids), []
    for (name, picture), own in zip(pictures, ids, strict=True):
        patches = in_colours(own, colours).resize(picture.size, Image.NEAREST)
        numbered(patches, own)
        kinds = len(np.unique(own))
        cells.append([(name, picture), (f"{kinds} codeword{'s' * (kinds > 1)} in {own.size} patches",
                                        ruled(patches, own.shape))])
    rows = [sum(cells[i:i + columns], []) for i in range(0, len(cells), columns)]
    key = colour_key(ids, colours, "codeword {}".format, len(rows[0]) * (pictures[0][1].width + GAP))
    return sheet(f"The most likely codeword of each patch: {len(np.unique(ids))} of {total:,} occur in {len(ids)} "
                 f"picture{'s' * (len(ids) > 1)}", rows, key)


def most_frequent(ids):
    """A colour for each of the most frequent of numbers (...) int.  -> {number: colour}, most frequent first"""
    found, counts = np.unique(ids, return_counts=True)
    return {int(found[i]): colour for i, colour in zip(np.argsort(-counts, kind="stable"), OKABE_ITO)}


def in_colours(ids, colours):
    """Numbers (rows, columns) int -> picture of their colours, one pixel each; GREY for the others."""
    found, places = np.unique(ids, return_inverse=True)
    values = np.array([tuple(bytes.fromhex(colours.get(int(k), GREY)[1:])) for k in found], np.uint8)
    return Image.fromarray(values[places.reshape(ids.shape)])


def colour_key(ids, colours, name, width):
    """What each colour stands for, and its share of the numbers; name: function(number) -> str."""
    shares = [(colour, f"{name(k)}: {100 * (ids == k).mean():.1f} %") for k, colour in colours.items()]
    if others := len(np.unique(ids)) - len(colours):
        shares.append((GREY, f"{others} others: {100 * (~np.isin(ids, list(colours))).mean():.1f} %"))
    entries = [beside([Image.new("RGB", (20, 20), colour), text(label, 180)], 6) for colour, label in shares]
    entries, many = entries or [text("nothing", 180)], max(1, width // 214)
    return beside([beside(entries[i:i + many]) for i in range(0, len(entries), many)], down=True)


def label_sheet(title, examples, names, side=176):
    """Pictures beside their labels and what a model says: the most frequent classes get colours, all their names.

    examples: [(name, picture, labels, guess)], both (H, W) int, classes 0 .. C - 1; labels above: none, left white, and
    what the model says there is pale
    """
    labelled = np.concatenate([labels.ravel() for _, _, labels, _ in examples])
    labelled = labelled[labelled < len(names)]
    colours, rows = most_frequent(labelled), []
    for name, picture, labels, guess in examples:
        seen, size = labels < len(names), (side, max(1, round(side * picture.height / picture.width)))
        right = f"{100 * (guess == labels)[seen].mean():.0f} % right" if seen.any() else "no labels"
        maps = []
        for classes, veil in ((labels, 255), (guess, 190)):
            image = in_colours(classes, colours)
            image.paste("white", mask=Image.fromarray(np.where(seen, 0, veil).astype(np.uint8)))
            maps.append(with_names(image.resize(size, Image.NEAREST), np.where(seen, classes.astype(int), -1),
                                   names))
        rows.append([(name, picture.resize(size, Image.BICUBIC)), ("labels", maps[0]), (f"model: {right}", maps[1])])
    rows = [sum(rows[i:i + 2], []) for i in range(0, len(rows), 2)]
    width = len(rows[0]) * (side + GAP)
    key = colour_key(labelled, colours, lambda k: names[k], width)
    note = text("Pale: without a label, like white. Shares are of the labelled pixels.", width)
    return sheet(title, rows, beside([key, note], down=True))


def with_names(image, classes, names, least=0.01):
    """The name of each class written where its pixels are; classes (H, W) int, -1: none; least: share of the pixels."""
    pen, scale = ImageDraw.Draw(image), image.width / classes.shape[1]
    for k, count in zip(*np.unique(classes[classes >= 0], return_counts=True)):
        if count >= least * classes.size:
            y, x = (scale * np.median(places) for places in np.nonzero(classes == k))
            face = font(12, names[k])
            half = face.getlength(names[k]) / 2 + 3
            x = min(max(x, half), max(image.width - half, half))  # inside the picture
            pen.text((x, y), names[k], "black", face, anchor="mm", stroke_width=2, stroke_fill="white")
    return image


def numbered(patches, ids):
    """Write its number into each patch, where four digits have room.  ids (rows, columns) int"""
    (rows, columns), pen = ids.shape, ImageDraw.Draw(patches)
    side = patches.width // columns
    for y, x in np.ndindex(rows, columns) if side >= 26 else ():
        place = side * x + side // 2, side * y + side // 2
        light = sum(patches.getpixel(place)) > 380
        pen.text(place, str(ids[y, x]), "black" if light else "white", font(11, ""), anchor="mm")


def ticked(picture, colour=OKABE_ITO[2]):
    """A right answer: a thick frame and a tick on a disc."""
    picture = picture.copy()
    pen, (w, h) = ImageDraw.Draw(picture), picture.size
    pen.rectangle((0, 0, w - 1, h - 1), outline=colour, width=7)
    pen.rectangle((7, 7, w - 8, h - 8), outline="white", width=2)
    x, y = w - 22, h - 22
    pen.circle((x, y), 20, "white")
    pen.circle((x, y), 18, colour)
    pen.line([(x - 9, y), (x - 3, y + 7), (x + 9, y - 7)], "white", 5, joint="curve")
    return picture


def neighbour_sheet(title, searches, side):
    """Rows of a query and its nearest.  searches: {heading: [(caption, query, [(similarity, found, right)])]}

    query and found are pictures, or str for sentences; right ones get a frame and a tick.
    """
    def shown(what):
        return card(what, side) if isinstance(what, str) else what
    rows = []
    for heading, queries in searches.items():
        rows.append(heading)
        for caption, query, nearest in queries:
            found = [(f"{similarity:.2f}", ticked(shown(what)) if right else shown(what))
                     for similarity, what, right in nearest]
            rows.append([(caption, shown(query)), ("", Image.new("RGB", (8, side), "white")), *found])
    return sheet(title, rows, "Frame and tick: right. Numbers: cosine similarity; rank: of the best that is right. The "
                 "queries stand evenly over the set, none was chosen.")


# ---------------------------------------------------------------- curves

# name of a panel -> the values of log.jsonl in it
PANELS = {
    "loss": ("loss", "auxiliary"), "contrastive loss": ("image", "text"),
    "masked and self-supervised losses": ("distill", "mlm", "pixel", "simclr"),
    "accuracy in the batch": ("accuracy",), "score while training": ("zeroshot", "linear", "finetune", "segment"),
    "scale 1 / sigma": ("scale",), "learning rate": ("lr",), "teacher's momentum": ("ema",),
    "entropy of the teacher's mean codewords": ("codeword_entropy",), "codewords in use": ("codewords_used",),
    "norm of the gradient": ("grad_norm",), "pictures/s": ("pictures_per_s",),
    "share of time waiting for data": ("data_wait",),
}


def read_log(path):
    """The records of a log.jsonl up to the first that is not whole, as an interrupted run may leave it; [] without."""
    records = []
    for line in Path(path).read_text("utf-8", "replace").splitlines() if Path(path).is_file() else ():
        try:
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, TypeError, KeyError):
            break
        records.append(record)
    return records


def series(records, name):
    """[(step, value)] of a log's records that have it."""
    return [(r["step"], r[name]) for r in records if r.get(name) is not None]


def span(logs):
    """The first and the last step of all logs."""
    steps = [record["step"] for records in logs for record in records]
    return min(steps, default=0), max(steps, default=0)


def curves(log, path, width=460, height=190):
    """Draw the curves of a log.jsonl over the steps as an SVG: two panels in a row, for a browser or a README."""
    records, drawn = read_log(log), []
    for title, names in PANELS.items():
        lines = [(name, i, series(records, name)) for i, name in enumerate(names) if series(records, name)]
        if lines:
            x, y = len(drawn) % 2 * width, len(drawn) // 2 * height
            drawn.append(f'<g transform="translate({x} {y})">{panel(title, lines, span([records]), width, height)}</g>')
    size = 2 * width, -(-len(drawn) // 2) * height
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
            f'height="{size[1]}" font-family="sans-serif" font-size="12" color="#222">')
    lines = [head, '<rect width="100%" height="100%" fill="white"/>', *drawn, "</svg>\n"]
    write_atomically(Path(path), "\n".join(lines).encode())


def panel(title, lines, steps, width, height, hover=0, left=72, top=28, right=14, bottom=26):
    """One panel: title and names, values at the axes, a line for each of [(name, number of colour, [(step, value)])].

    hover: height of a line below, where the values of the step under the pointer are shown (by CSS; 0: none).
    """
    bottom += hover
    every = [point for _, _, points in lines for point in points]
    (first, last), low, high = steps, min(value for _, value in every), max(value for _, value in every)
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10

    def place(step, value):
        return (left + (width - left - right) * (step - first) / max(1, last - first),
                height - bottom - (height - top - bottom) * (value - low) / (high - low))
    out = [f'<text x="{left}" y="18" font-weight="bold" fill="currentColor">{escape(title)}</text>']
    for value in (low, (low + high) / 2, high):
        y = place(first, value)[1]
        out.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="currentColor" stroke-opacity=".15"/><text '
                   f'x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="currentColor">{value:.3g}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        out.append(f'<text x="{place(step, low)[0]:.1f}" y="{height - bottom + 18}" text-anchor="{anchor}" '
                   f'fill="currentColor">step {step:,}</text>')
    end = width - right
    for name, k, points in reversed(lines):
        colour, kind = OKABE_ITO[k % 8], f"c{k % 8}"
        thin = points[::max(1, len(points) // 1000)]  # more than the panel has pixels
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in thin))
        dot = '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.5" fill="{}"/>'.format(kind, *place(*points[-1]), colour)
        out.append(f'<polyline class="{kind}" points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>{dot}')
        if len(lines) > 1:
            out.append(f'<text class="{kind}" x="{end}" y="18" text-anchor="end" fill="{colour}">{escape(name)}</text>')
            end -= 8 * len(name) + 10
    return "".join(out + hover_areas(lines, place, left, top, width, height, bottom) * bool(hover))


def hover_areas(lines, place, left, top, width, height, bottom, count=60):
    """At most `count` upright stripes that fill a panel, each with a rule, dots and the values nearest to its step."""
    steps = sorted({step for _, _, points in lines for step, _ in points})
    steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, count).round().astype(int))]
    xs, out = [place(step, 0)[0] for step in steps], []
    edges = [left - 6, *((a + b) / 2 for a, b in zip(xs, xs[1:])), width]
    lines = [(name, k, points[::max(1, len(points) // 1000)] + points[-1:]) for name, k, points in lines]
    for step, x, start, end in zip(steps, xs, edges, edges[1:]):
        near = [(name, k, min(points, key=lambda point: abs(point[0] - step))) for name, k, points in lines
                if points[0][0] <= step <= points[-1][0]]
        dots = "".join('<circle class="c{}" cx="{:.1f}" cy="{:.1f}" r="3.5"/>'.format(k % 8, *place(*point))
                       for _, k, point in near)
        said = "  ".join(f"{escape(name)} {value:.4g}" for name, _, (_, value) in near)
        out.append(f'<g class="at"><rect x="{start:.1f}" y="{top - 8}" width="{end - start:.1f}" '
                   f'height="{height - top - bottom + 16}"/><path d="M{x:.1f} {top}V{height - bottom}"/>{dots}'
                   f'<text x="{left}" y="{height - 6}">step {step:,}: {said}</text></g>')
    return out


# ---------------------------------------------------------------- the report

STYLE = """
:root{color-scheme:light dark;--paper:#fcfcfa;--ink:#1c1e21;--soft:#5f646b;--rule:#dedfdb;--mark:#fff1cf;--bar:#0072b2}
body{margin:0 auto;padding:2.5rem 1.25rem 5rem;max-width:78rem;background:var(--paper);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem;font-weight:650;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.8rem 0 .7rem;font-weight:650}
p,figcaption{color:var(--soft);margin:.3rem 0;max-width:46rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;width:max-content}
th,td{text-align:left;padding:.36rem 1.6rem .36rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:500;color:var(--soft)} thead th{vertical-align:bottom} td.n,th.n{text-align:right;white-space:nowrap}
td{overflow-wrap:break-word;min-width:4rem;max-width:26rem} td.own{font-weight:600} tr.differs>*{background:var(--mark)}
td i{display:block;height:3px;background:var(--rule)} td i b{display:block;height:3px;background:var(--bar)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr));gap:0 2rem;margin:0;
 font-size:.92rem}
dl div{display:flex;justify-content:space-between;gap:1rem;padding:.36rem 0;border-bottom:1px solid var(--rule)}
dt{color:var(--soft);white-space:nowrap} dd{margin:0;text-align:right;overflow-wrap:anywhere;min-width:0}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,23rem),1fr));gap:1rem 2rem}
svg{display:block;width:100%;height:auto;font-size:12px} svg text{white-space:pre}
.at rect{fill:none;pointer-events:all} .at path{stroke:currentColor;stroke-opacity:.35} .at text{fill:currentColor}
.at>:not(rect){opacity:0;pointer-events:none} .at:hover>*{opacity:1}
figure{margin:1rem 0 1.6rem} img{display:block;border-radius:6px;background:#fff}
.key{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.4em}
LIGHT
@media(prefers-color-scheme:dark){
:root{--paper:#141618;--ink:#e6e6e2;--soft:#a0a5ab;--rule:#2e3236;--mark:#3b3213;--bar:#56b4e9}
img{filter:brightness(.88)}
DARK}
"""
DARK = ("#4aa3df", "#f0803c", "#2cc295", "#dd9bc0", "#f0b232", "#8ccff5", "#f0e442", "#e6e6e2")  # lighter
LIGHT = (*OKABE_ITO[:6], "#a89a00", "#000000")  # the yellow darker than Okabe and Ito's, which is lost on white


def report(runs, path):
    """Write a report of runs, compared side by side, as one HTML file that asks nothing of any network.

    runs: a list of dicts of name; about, config {label: value}; log (records of log.jsonl); scores {task:
    {"scores": {name: share in [0, 1]}, "chance", "over"}}; paper {task: {name: per cent}}; sheets [(caption, picture)];
    remarks [str].  All words are escaped: names and captions may hold anything.
    """
    letters = [chr(65 + i % 26) + str(i // 26 or "") for i in range(len(runs))]
    title = runs[0]["name"] if len(runs) == 1 else f"{len(runs)} runs compared"
    heads = [""] if len(runs) == 1 else [
        f'<span class="key" style="background:var(--c{i % 8})"></span>{letter} {escape(run["name"])}'
        for i, (letter, run) in enumerate(zip(letters, runs))]
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(line)}</p>" for run in runs for line in run["remarks"])]
    parts += [compared([run["about"] for run in runs], heads), "<h2>Scores</h2>", score_table(runs, heads)]
    drawn = run_panels(runs, letters)
    parts += ["<h2>Curves</h2>", "<p>Point at a curve, or touch it, to read its values.</p>" if drawn else
              "<p>log.jsonl has no lines yet.</p>", f'<div class="panels">{drawn}</div>']
    if drawn:
        parts += ["<h2>Log</h2>", compared([log_summary(run["log"]) for run in runs], heads)]
    for letter, run in zip(letters, runs):
        if run["sheets"]:
            parts.append(f"<h2>Pictures{'' if len(runs) == 1 else f' of {letter}, ' + escape(run['name'])}</h2>")
            parts += [f'<figure><div class="scroll">{embedded(image, caption)}</div><figcaption>{escape(caption)}'
                      "</figcaption></figure>" for caption, image in run["sheets"]]
    if any(run["config"] for run in runs):
        parts += ["<h2>Settings</h2>", compared([run["config"] for run in runs], heads, mark=True)]
    colours = [":root{" + "".join(f"--c{k}:{c};" for k, c in enumerate(theme)) + "}" for theme in (LIGHT, DARK)]
    lines = "".join(f"polyline.c{k}{{stroke:var(--c{k})}}text.c{k},circle.c{k}{{fill:var(--c{k})}}" for k in range(8))
    style = STYLE.replace("LIGHT", colours[0] + lines).replace("DARK", colours[1])
    html = ['<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            f'style-src \'unsafe-inline\'"><title>{escape(title)}</title><style>{style}</style></head><body>',
            *parts, "</body></html>\n"]
    write_atomically(Path(path), "\n".join(html).encode("utf-8", "backslashreplace"))


def compared(runs, heads, mark=False):
    """[{label: value}] as a list, or of several runs as a table; mark: what differs comes first, with a sign."""
    if len(runs) == 1:
        return "<dl>" + "".join(f"<div><dt>{escape(str(label))}</dt><dd>{escape(str(value))}</dd></div>"
                                for label, value in runs[0].items()) + "</dl>"
    labels = dict.fromkeys(label for run in runs for label in run)
    differs = {label: mark and len({str(run[label]) for run in runs if label in run}) > 1 for label in labels}
    body = "".join('<tr{}><th scope="row">{}{}</th>{}</tr>'.format(
        ' class="differs"' * differs[label], "&ne; " * differs[label], escape(label),
        "".join(f"<td>{escape(str(run.get(label, '-')))}</td>" for run in runs))
        for label in sorted(labels, key=lambda label: not differs[label]))
    return table("", "".join(f'<th scope="col">{head}</th>' for head in heads), body)


def table(first, heads, body):
    """A table that scrolls by itself where the page is narrow."""
    return (f'<div class="scroll"><table><thead><tr><th scope="col">{first}</th>{heads}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def score_table(runs, heads):
    """Per cent, a row per score; the paper's beside ours where any of its numbers is of one of these tests."""
    tasks = {}
    for run in runs:
        for task, result in run["scores"].items():
            tasks.setdefault(task, {}).update(dict.fromkeys(result["scores"], result))
    if not tasks:
        return "<p>Nothing was evaluated yet: see python evaluate.py --help.</p>"
    shown = [any(set(run["paper"].get(task, {})) & set(scores) for task, scores in tasks.items()) for run in runs]
    row = '<th scope="col">score</th>' + "".join(
        f'<th scope="col" class="n">{head or "this run"}</th>' + '<th scope="col" class="n">paper</th>' * paper
        for head, paper in zip(heads, shown)) + '<th scope="col" class="n">chance</th><th scope="col">of</th>'
    body = ""
    for task, scores in tasks.items():
        for number, (score, result) in enumerate(scores.items()):
            cells = ""
            for run, paper in zip(runs, shown):
                ours = run["scores"].get(task, {}).get("scores", {}).get(score)
                cells += '<td class="n">-</td>' if ours is None else (
                    f'<td class="n own">{100 * ours:.1f}<i><b style="width:{100 * ours:.1f}%"></b></i></td>')
                cells += f'<td class="n">{run["paper"].get(task, {}).get(score, "-")}</td>' * paper
            chance = "" if number or result["chance"] is None else f"{100 * result['chance']:.1f}"
            body += (f'<tr><th scope="row">{escape(task) * (not number)}</th><td>{escape(score)}</td>{cells}'
                     f'<td class="n">{chance}</td><td>{escape(result["over"]) * (not number)}</td></tr>')
    note = ("The paper's: ViT-B/16, YFCC-15M, 25 epochs (DeiT: ImageNet-1K, 300)." if any(shown) else
            "The paper has no numbers of these tests.")
    return table("test", row, body) + f"<p>Per cent. {note} Chance is that of a test's first score.</p>"


def run_panels(runs, letters):
    """The curves: of one run as in `curves`, of several a panel for each value with a line for each run."""
    out, steps = [], span([run["log"] for run in runs])
    for title, names in PANELS.items():
        if len(runs) == 1:
            several = [(title, [(name, k, series(runs[0]["log"], name)) for k, name in enumerate(names)])]
        else:
            several = [(title if len(names) == 1 else f"{title}: {name}",
                        [(letter, k, series(run["log"], name)) for k, (letter, run) in enumerate(zip(letters, runs))])
                       for name in names]
        for label, lines in several:
            if lines := [line for line in lines if line[2]]:
                out.append(f'<svg viewBox="0 0 460 210" role="img" aria-label="{escape(label)}">'
                           f'{panel(label, lines, steps, 460, 210, hover=20)}</svg>')
    return "".join(out)


def log_summary(records):
    """What a log says of the whole run.  -> {label: text}"""
    summary = {}
    for name, label, reduce, form in (("pictures_per_s", "pictures/s, median", np.median, "{:,.0f}"),
                                      ("data_wait", "time waiting for data", np.mean, "{:.1%}"),
                                      ("memory_gib", "memory, highest", max, "{:.2f} GiB"),
                                      ("skipped", "steps without update", max, "{:,}"),
                                      ("bad", "bad pairs", max, "{:,}"), ("step", "last step of the log", max, "{:,}")):
        if points := series(records, name):
            summary[label] = form.format(reduce([value for _, value in points]))
    return summary


def embedded(image, words):
    """A picture inside the page, in 256 colours: a fifth of the bytes, for faint bands in smooth maps."""
    content = io.BytesIO()
    image.quantize(256, Image.Quantize.FASTOCTREE).save(content, "PNG", optimize=True)
    return (f'<img alt="{escape(words)}" width="{image.width}" height="{image.height}" '
            f'src="data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}">')


# ---------------------------------------------------------------- runs compared

PAPER_COLUMNS = {"IN-1K zero-shot": ("zeroshot imagenet", "accuracy"), "linear": ("linear imagenet", "accuracy"),
                 "Flickr30K I2T R@1": ("retrieval flickr30k", "i2t R@1"), "T2I R@1": ("retrieval flickr30k", "t2i R@1")}


def comparison(runs, paper, further=()):
    """The paper's table 1 for runs of train.py, as Markdown: cost and scores, a row for runs that differ in seed alone.

    runs: what evaluate.compared_run gives; paper: {method: {task: {score: per cent}}}; further: notes.  Scores:
    per cent, mean and standard deviation over the row's runs.  Below: what each row has more than CLIP's, with the
    standard error; the paper's numbers; notes.
    """
    groups = {}
    for run in runs:
        groups.setdefault(tuple(sorted(run["settings"].items())), []).append(run)
    (labels, clip), groups = row_labels([dict(settings) for settings in groups]), list(groups.values())
    heads = list(dict.fromkeys(head for group in groups for run in group for head in run["scores"]))
    scores = [[[run["scores"][head] for run in group if head in run["scores"]] for head in heads] for group in groups]
    costs = [{name: statistics.mean(run["cost"][name] for run in group) for name in group[0]["cost"]}
             if all(run["cost"] for run in group) else {} for group in groups]
    rows, gaps = [["", "seeds", "epochs", "minutes", "memory", "time", *heads]], []
    for i, (label, group, cost) in enumerate(zip(labels, groups, costs)):
        base = cost and clip is not None and costs[clip]
        rows.append([label, str(len(group)), *((f"{cost['epochs']:.3g}", f"{cost['minutes']:.1f}") if cost else "--"),
                     *(f"{cost[name] / base[name]:.2f}x" if base else "-" for name in ("memory", "time")),
                     *map(score_cell, scores[i])])
        if clip not in (None, i) and any(cells := [gap_cell(*pair) for pair in zip(scores[i], scores[clip])]):
            gaps.append([f"{label} less {labels[clip]}", *[""] * 5, *(cell or "-" for cell in cells)])
    parts = [markdown(rows + gaps)]
    if known := [method for method in dict.fromkeys(run["settings"]["method"] for run in runs) if method in paper]:
        theirs = [["the paper (ViT-B/16, YFCC-15M, 25 epochs)", "memory", "time", *PAPER_COLUMNS]]
        for method in known:
            cost = paper[method].get("cost")
            theirs.append([f"paper: {method}", *((f"{cost['memory GB']} G", f"{cost['time']:.2f}x") if cost else "--"),
                           *(str(paper[method].get(task, {}).get(x, "-")) for task, x in PAPER_COLUMNS.values())])
        parts.append(markdown(theirs))
    notes = ["± of a row: standard deviation over its runs (n - 1)" + (
        "; of a difference: its standard error, sqrt(s1^2 / n1 + s2^2 / n2); `*`: more than two of them" * bool(gaps))]
    notes.append("commits: " + "; ".join(f"{label} {', '.join(dict.fromkeys(run['commit'] for run in group))}"
                                         for label, group in zip(labels, groups)))
    for label, group, values in zip(labels, groups, scores):
        for seed, count in collections.Counter(run["seed"] for run in group).items():
            notes += [f"{label}: {count} runs have seed {seed}: these are no independent seeds"] * (count > 1)
        if len(digests := dict.fromkeys(run["pairs"] for run in group)) > 1:
            notes.append(f"{label}: the runs saw different data: {'; '.join(map(str, digests))}")
        notes += [f"{label}: {len(x)} of {len(group)} runs have {head}" for head, x in zip(heads, values)
                  if 0 < len(x) < len(group)]
    notes += further
    notes += [f"{run['folder']} is not at its end: {run['left']:,.0f} steps are left" for run in runs
              if run["left"] >= 1]
    if bare := [f"{run['folder']}/last.pt" for run in runs if not run["scores"]]:
        notes.append(f"no scores of these weights yet: python evaluate.py --checkpoint {' '.join(bare)} --zeroshot ... "
                     "--linear ... --retrieval ...")
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)])


def row_labels(groups):
    """Settings of each row, {name: value} -> labels, and the number of CLIP's row (of several: most like the others).

    A label is the method, where methods differ, and the settings that are not the most common ones (on a tie: the
    first row's); "?" is a setting that the checkpoint does not know.
    """
    names = dict.fromkeys(name for settings in groups for name in settings if name != "method")
    usual = {name: statistics.mode(settings.get(name, "?") for settings in groups) for name in names}
    other = [[f"--{name.replace('_', '-')} {settings.get(name, '?') or repr('')}" for name in names
              if settings.get(name, "?") != usual[name]] for settings in groups]
    methods = [settings["method"] for settings in groups]
    labels = [" ".join([method] * (len(set(methods)) > 1 or not flags) + [f"`{' '.join(flags)}`"] * bool(flags))
              for method, flags in zip(methods, other)]
    return labels, min((i for i, method in enumerate(methods) if method == "clip"), key=lambda i: len(other[i]),
                       default=None)


def score_cell(values):
    """Shares -> mean and standard deviation, per cent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}" if values else "-"


def gap_cell(values, others):
    """Shares of two rows -> difference of the means and its standard error, points; "" where either has but one."""
    if min(len(values), len(others)) < 2:
        return ""
    gap = statistics.mean(values) - statistics.mean(others)
    error = math.sqrt(sum(statistics.variance(x) / len(x) for x in (values, others)))
    return f"{100 * gap:+.1f} ± {100 * error:.1f}" + "*" * (abs(gap) > 2 * error)


def markdown(rows):
    """Rows of text, the first of heads -> a table that reads well as it is, too."""
    widths = [max(2, *map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *rows[1:]]
    return "\n".join("| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
                     for row in rows)
