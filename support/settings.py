"""Settings: a dataclass makes the command line; its fields with `flag` are flags."""
import argparse
import dataclasses
import math


def flag(default, help):
    """A field of a config that is a flag on the command line."""
    return dataclasses.field(default=default, metadata=dict(help=help))


def parse_flags(config_class, description, argv=None, recipes=None):
    """The command line of a config's flags -> {field: value} of what was given.

    recipes: {name: {field: default}}, to show in --help which default is in force
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for f in dataclasses.fields(config_class):
        if "help" not in f.metadata:
            continue
        kind = dict(type=f.type)
        if f.type is bool:
            kind = dict(action="store_true")
        if f.type is list:
            kind = dict(nargs="+")
        parser.add_argument("--" + f.name.replace("_", "-"), **kind, default=argparse.SUPPRESS,
                            help=f.metadata["help"] + shown_default(f, recipes or {}))
    return vars(parser.parse_args(argv))


def shown_default(f, recipes):
    """The defaults of a field for --help: its own, and those of the recipes that change it."""
    if f.default in ("", False):
        return ""
    text = " ".join(f.default) if isinstance(f.default, tuple) else str(f.default)
    for name, recipe in recipes.items():
        if recipe.get(f.name, f.default) != f.default:
            text += f"; {name}: {recipe[f.name]}"
    return f" (default: {text})"


def check_ranges(config, choices, ranges):
    """Raise ValueError for a setting that is none of its choices, not finite, or out of range.

    choices: {field: allowed values}; ranges: (lowest, highest, fields); those of all runs are here
    """
    choices = choices | dict(precision=("auto", "fp32", "bf16", "fp16"))
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"unknown --{name} '{value}': one of {', '.join(allowed)}")
    ranges = [*ranges, (1, math.inf, ("epochs", "batch_size", "log_every")),
              (0, math.inf, ("steps", "eval_every", "lr", "weight_decay")),
              (0, 2 ** 63 - 1, ("seed",)),  # PyTorch's
              (-1, 999, ("workers",))]
    for lowest, highest, names in ranges:
        for name in names:
            value = getattr(config, name)
            if not lowest <= value <= highest or math.isinf(value):
                at_most = "" if highest == math.inf else f" and at most {highest}"
                raise ValueError(f"--{name.replace('_', '-')} must be a number of at least "
                                 f"{lowest}{at_most}, not {value}")
