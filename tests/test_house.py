"""The house itself: which room imports which, how large they are, the loop in one place."""
import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ("losses", "tokenizer", "model", "data", "evaluate", "train")
SUPPORT = tuple(f"support.{path.stem}" for path in sorted((ROOT / "support").glob("[a-z]*.py")))
# Each room and what it may import of ours.  Nothing imports tools.
ARROWS = {
    "losses": (), "tokenizer": (),
    "support.settings": (), "support.runtime": (), "support.probe": (),
    "support.pictures": (), "support.shards": ("support.pictures",),
    "support.checkpoints": ("support.runtime",), "support.demo": ("support.shards",),
    "model": (),
    "data": ("tokenizer", "support.shards", "support.demo", "support.pictures"),
    "support.weights": ("model", "tokenizer", "data", "support.checkpoints", "support.runtime"),
    "support.testsets": ("data", "support.shards", "support.demo", "support.pictures"),
    "support.results": ("support.testsets", "support.weights"),
    "evaluate": ("data", "model", "tokenizer", "support.weights", "support.testsets",
                 "support.results", "support.probe", "support.runtime"),
    "train": (*CORE[:5], *SUPPORT),
    "tools.readers": ("data", *SUPPORT),
    "tools.prepare": ("data", "tokenizer", "tools.readers", *SUPPORT),
    "tools.plots": ("data", "model", "evaluate", "tools.compare", *SUPPORT),
    "tools.compare": ("evaluate", "train", *SUPPORT),
    "tools.export": ("data", "evaluate", "model", "tokenizer", *SUPPORT),
    "tools.bench": (*CORE, *SUPPORT),
    "downstream.finetune": (*CORE, *SUPPORT),
    "downstream.segment": (*CORE, *SUPPORT, "downstream.finetune"),
}


def imports_of(tree):
    """Every module that a file imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            if node.module in ("support", "tools", "downstream"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def rooms():
    files = [*ROOT.glob("*.py"), *(file for folder in ("support", "tools", "downstream")
                                   for file in (ROOT / folder).glob("[a-z]*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def test_the_arrows_are_those_of_the_design():
    assert set(rooms()) == set(ARROWS)
    for room, file in rooms().items():
        ours = set(imports_of(ast.parse(file.read_text()))) & set(ARROWS)
        assert ours <= set(ARROWS[room]), (room, ours - set(ARROWS[room]))


def test_nothing_else_is_at_the_top_level():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    top = {name.split("/")[0] for name in run.stdout.splitlines() if not name.startswith(".")}
    files = {f"{room}.py" for room in CORE} | {"README.md", "LICENSE", "requirements.txt"}
    assert top == files | {"pytest.ini", "ruff.toml", "docs", "downstream", "support", "tests",
                           "tools"}


def test_the_sizes_are_those_of_an_evening():
    lines = {room: len(file.read_text().splitlines()) for room, file in rooms().items()}
    assert sum(lines[room] for room in CORE) <= 2600 and max(lines[room] for room in CORE) <= 620
    assert sum(lines.values()) - lines["tools.bench"] <= 7400  # 5,600 is the aim
    tests = sum(len(file.read_text().splitlines()) for file in (ROOT / "tests").glob("*.py"))
    assert tests <= 6000  # 5,000 is the aim


@pytest.mark.parametrize("name", ["ema_update", "update_center", "backward", "step", "clamp_",
                                  "write", "try_save", "on_rank0", "stop_requested"])
def test_every_side_effect_of_a_step_is_in_the_loop(name):
    """Within 90 consecutive lines of one function, with the sum of the losses in sight."""
    tree = ast.parse((ROOT / "train.py").read_text())
    train, = (node for node in tree.body if getattr(node, "name", "") == "train")
    loop, = (node for node in ast.walk(train) if isinstance(node, ast.While))
    assert loop.end_lineno - loop.lineno < 90
    calls = [node.func for node in ast.walk(loop) if isinstance(node, ast.Call)]
    assert name in {getattr(call, "attr", getattr(call, "id", "")) for call in calls}
    text = ast.unparse(loop)
    assert "distill_weight * L['distill']" in text and "L['image'] + L['text']" in text
