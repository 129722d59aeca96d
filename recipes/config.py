"""What a training can be told: the fields of `Config` and of `pcdeq_zoo.Recipe` are the flags of train.py."""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pcdeq_zoo import VARIANTS, Recipe, Variant
from pcdeq_zoo.variants import check_setting, setting


@dataclass(frozen=True)
class Config:
    """What is not the recipe's."""

    model: str = setting("name in the zoo, e.g. pcdeq1_l_tanh_mnist", required=True)
    recipe: str = setting("paper, zoo, ... (default: that of the model's default checkpoint)")
    output: Path = setting("folder of the run (default: runs/<model>.<recipe>)")
    channels: tuple[int, ...] | None = setting(
        "width of each pcDEQ layer (default: the paper's)", None, above=0, below=2**16, nargs="+", metavar="N"
    )
    data: str | None = setting("folder, 'sample' or 'hub' (default: below $PCDEQ_ZOO_DATA, else the Hub)", None)
    module: str | None = setting("import this first: it registers models with timm, and has VARIANTS of its own", None)
    resume: str | None = setting(
        "go on from the newest state of --output, or from STATE", None, nargs="?", const="latest", metavar="STATE"
    )
    save_every: int | None = setting("save the state also within epochs", None, above=0, below=2**31, metavar="STEPS")
    minutes: float | None = setting(
        "train for so long, whatever epochs get done; the recipe's schedule is stretched over it", None, above=0
    )
    log_every: int | None = setting(
        "write a line to steps.jsonl, too, every so many steps", None, above=0, below=2**31, metavar="STEPS"
    )
    grad_accum: int = setting("forwards per optimizer step", 1, above=0, below=2**20, metavar="N")
    mixed_precision: Literal["no", "bf16"] | None = setting(
        "bf16: products in bfloat16, equilibria in float32 (default: accelerate's)", None
    )
    seed: int = setting("of the weights, of the order of the images, of their augmentation", 0, at_least=0, below=2**32)
    limit_train: int | None = setting(
        "train on the first N images only, none of them held out", None, above=0, below=2**31, metavar="N"
    )
    hold_out: int | None = setting(
        "measure on the last N training images, and leave the test set alone", None, above=0, below=2**31, metavar="N"
    )
    report_to: Literal["tensorboard"] | None = setting("beside log.jsonl", None)
    cpu: bool = setting("even where there is a GPU", False)
    processes: int | None = setting(
        "refuse to run as any other number of processes", None, above=0, below=2**16, metavar="N"
    )

    @property
    def variant(self) -> Variant:
        """The network."""
        return VARIANTS[self.model]


def train_slices(count: int, images: int | None, hold_out: int | None) -> tuple[slice, slice]:
    """Which of `count` training images a run is trained on, and which it holds out: the last of the first `images`."""
    end = min(count, images or count)
    return slice(0, end - (hold_out or 0)), slice(end - (hold_out or 0), end)


def import_module(name: str) -> None:
    """Import a module that registers models with timm, and add its VARIANTS to those of the zoo, for this process.

    Raises:
        SystemExit: There is no such module, or one without VARIANTS, or with names that the zoo has.
    """
    try:
        others = importlib.import_module(name).VARIANTS
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"--module {name}: {error}; wanted a module with VARIANTS, see PYTHONPATH") from error
    if taken := [key for key in others if VARIANTS.get(key, others[key]) is not others[key]]:
        raise SystemExit(f"--module {name}: the zoo has a {taken[0]} of its own")
    VARIANTS.update(others)


# Of a width that does not depend on the terminal: train.txt and its like, which `--help` prints, are made with it.
HelpFormatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=100)


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command line of train.py."""
    # No abbreviations: sweep.py must know which flags it is given.
    parser = argparse.ArgumentParser(
        "train.py", description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    _add_flags(parser, Config)
    _add_flags(parser.add_argument_group("recipe", "By default what pcdeq_zoo.VARIANTS[model].recipes says."), Recipe)
    return parser


def parse(description: str | None, arguments: Sequence[str] | None = None) -> tuple[Config, Recipe]:
    """The config and the recipe that a command line asks for; ends with a line about a flag that is wrong."""
    parser = make_parser(description)
    given = vars(parser.parse_args(arguments))

    if "channels" in given:
        given["channels"] = tuple(given["channels"])
    if module := given.get("module"):
        import_module(module)
    if (model := given["model"]) not in VARIANTS:
        name, _, tag = model.partition(".")
        hint = f"say --model {name} --recipe {tag}" if name in VARIANTS else f"the zoo has {', '.join(VARIANTS)}"
        parser.error(f"unknown model {model}; {hint}")
    tag = given.setdefault("recipe", VARIANTS[model].default_recipe)
    if tag not in VARIANTS[model].recipes:
        parser.error(f"{model} has no recipe {tag}; it has {', '.join(VARIANTS[model].recipes)}")
    given.setdefault("output", Path("runs") / f"{model}.{tag}")
    settings = {entry.name: given.pop(entry.name) for entry in fields(Recipe) if entry.name in given}
    recipe = VARIANTS[model].recipes[tag]
    if "epochs" in settings:
        recipe = recipe.of_epochs(settings["epochs"])
    return Config(**given), replace(recipe, **settings)


_ARGPARSE = ("required", "nargs", "const", "metavar")  # what a setting may say to it


def _add_flags(parser: argparse._ActionsContainer, record: type) -> None:
    """A flag for each field of a record of settings; what is not given stays out of the namespace."""
    hints = get_type_hints(record)
    for entry in fields(record):
        flag, kind = f"--{entry.name.replace('_', '-')}", _without_none(hints[entry.name])
        facts = {key: entry.metadata[key] for key in _ARGPARSE if key in entry.metadata}
        if kind is bool:
            facts["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            facts["choices"] = get_args(kind)
        else:
            number = kind in (int, float) and kind is not hints[entry.name]
            facts["type"] = _reader(entry, get_args(kind)[0] if get_origin(kind) is tuple else kind, none=number)
        parser.add_argument(flag, help=entry.metadata["meaning"], default=argparse.SUPPRESS, **facts)


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, UnionType):
        return hint
    (kind,) = (part for part in get_args(hint) if part is not NoneType)
    return kind


def _reader(entry: Field[Any], kind: type, none: bool) -> Callable[[str], Any]:
    """What turns the text of a flag into its value, maybe "none" into None, and refuses one outside the limits."""

    def read(text: str) -> Any:
        if none and text == "none":
            return None
        value = kind(text)
        try:
            check_setting(entry, value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    read.__name__ = kind.__name__  # argparse says "invalid int value" of text that is none
    return read
