"""The command line: `python -m jaxjd.demo`."""

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from jaxjd.demo.data import DATASETS
from jaxjd.demo.train import AGGREGATORS

DEFAULT_AGGREGATORS = ("upgrad", "mgda", "pcgrad", "cagrad", "aligned_mtl")

_DESCRIPTION = """\
Trains one network on several tasks at once, on real data that comes inside two small packages: once
with the gradient of the mean of the losses, and once with each chosen aggregator, from the same
initial parameters and on the same batches. Prints a table, and writes a picture of the losses and
of the cosines between the tasks' gradients, and all numbers as JSON.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Args:
        arguments: Those of the command line, without the program's name.

    Returns:
        The exit code.

    Raises:
        SystemExit: With code 2 if an option is bad, with code 1 if a package is missing.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    source = DATASETS[options.data]
    if options.batch_size > source.num_train:
        parser.error(
            f"argument --batch-size: {options.batch_size} is more than the {source.num_train} "
            f"training examples of {options.data}"
        )
    missing = [name for name in ("rich", "matplotlib", source.package) if find_spec(name) is None]
    if missing:
        install = 'pip install "jaxjd[demo]"'
        parser.exit(1, f"{parser.prog}: the demo needs {', '.join(missing)}: {install}\n")

    # Only here: these modules import what may be missing.
    from jaxjd.demo.session import Settings, run

    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make the directory {options.out}: {error.strerror}")
    if not os.access(options.out, os.W_OK):
        parser.error(f"argument --out: cannot write into {options.out}")
    if options.steps is None:
        options.steps = source.default_steps
    try:
        run(Settings(**vars(options)))
    except KeyboardInterrupt:
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    default_steps = ", ".join(f"{s.default_steps} for {name}" for name, s in DATASETS.items())
    parser = _Parser(
        prog="python -m jaxjd.demo",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        type=_known(DATASETS, "data set"),
        default="multimnist",
        metavar="NAME",
        help="multimnist: pairs of overlapping digits, a task for each of the two; "
        "yeast: functions of genes, 14 yes/no tasks (default: %(default)s)",
    )
    parser.add_argument(
        "--aggregators",
        type=_aggregator_names,
        default=",".join(DEFAULT_AGGREGATORS),
        metavar="NAMES",
        help=f"some of {', '.join(AGGREGATORS)}, with commas between them (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=_integer(1),
        metavar="N",
        help=f"training steps of each method (default: {default_steps})",
    )
    parser.add_argument(
        "--batch-size",
        type=_integer(1),
        default=64,
        metavar="N",
        help="examples a step (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=_positive,
        default=2e-3,
        metavar="RATE",
        help="of adam, the same for all methods (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_integer(0, 2**31 - 1),
        default=0,
        metavar="N",
        help="of the split, the initial parameters, the batches and the random aggregators "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("jaxjd-demo"),
        metavar="DIRECTORY",
        help="where NAME.png and NAME.json go, for the NAME of the data; made if need be "
        "(default: %(default)s)",
    )
    return parser


def _known(valid: Mapping[str, object], kind: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in valid:
            raise argparse.ArgumentTypeError(
                f"unknown {kind} {text!r}: choose from {', '.join(valid)}"
            )
        return text

    return parse


def _aggregator_names(text: str) -> tuple[str, ...]:
    names = tuple(map(_known(AGGREGATORS, "aggregator"), text.replace(" ", "").split(",")))
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise argparse.ArgumentTypeError(f"named twice: {', '.join(repeated)}")
    return names


def _integer(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    bounds = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < lowest or (highest is not None and value > highest):
            raise argparse.ArgumentTypeError(f"expected an integer {bounds}, found {text!r}")
        return value

    return parse


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a finite positive number, found {text!r}")
    return value
