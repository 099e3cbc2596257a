"""The whole of the demo, from the options to the files."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from jaxjd.demo.data import DATASETS, Dataset, batch_indices
from jaxjd.demo.figure import save_figure
from jaxjd.demo.models import make_model
from jaxjd.demo.report import as_json, print_report, save_json
from jaxjd.demo.results import Result
from jaxjd.demo.train import (
    BASELINE,
    Batch,
    Method,
    Run,
    evaluate,
    make_method,
    num_timing_rounds,
    time_steps,
    train,
)

# Rich takes 80 columns where there is no terminal; the table needs a little more.
_WIDTH_WITHOUT_TERMINAL = 100


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Attributes:
        data: A key of `DATASETS`.
        aggregators: Keys of `AGGREGATORS`.
        steps: Training steps of each method.
        batch_size: Examples a step.
        learning_rate: Of adam, for all methods.
        seed: Of everything that is drawn.
        out: An existing directory.
    """

    data: str
    aggregators: tuple[str, ...]
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    out: Path


def run(settings: Settings) -> None:
    """Trains with every method, prints the report and writes the files."""
    start = time.perf_counter()
    console = _make_console()
    with console.status("loading the data"):
        dataset = DATASETS[settings.data].load(settings.seed)
    console.print(_opening(dataset, settings), highlight=False)
    results = _results(settings, dataset, console)
    print_report(console, dataset, results)

    picture = settings.out / f"{settings.data}.png"
    save_figure(picture, dataset, results)
    numbers = settings.out / f"{settings.data}.json"
    options = asdict(settings) | {"out": str(settings.out)}
    seconds = time.perf_counter() - start
    save_json(numbers, as_json(options, dataset, results, seconds))
    console.print(f"\nWrote {picture} and {numbers} after {seconds:.0f} s.", soft_wrap=True)


def _results(settings: Settings, dataset: Dataset, console: Console) -> list[Result]:
    model = make_model(dataset)
    params = jax.jit(model.init)(jax.random.key(settings.seed))
    batches = _batches(settings, dataset)
    methods: list[Method] = []
    runs: list[Run] = []
    with _Bars(console) as bars:
        for name in (BASELINE, *settings.aggregators):
            bars.begin(f"{name}: compiling", settings.steps)
            method = make_method(
                name,
                model.losses,
                dataset.num_tasks,
                settings.learning_rate,
                settings.seed,
                params,
                batches(0),
            )
            bars.rename(f"{name}: training")
            trained, measures = train(method, params, batches, settings.steps, bars.advance)
            losses, correct = evaluate(model, trained, dataset.test_inputs, dataset.test_targets)
            bars.end(name)
            methods.append(method)
            runs.append(Run(measures, losses, correct))
        bars.begin("timing all", num_timing_rounds(settings.steps))
        step_ms = time_steps(methods, params, batches, settings.steps, bars.advance)
        bars.end("timing all")
    return [
        Result(method.name, run, times, method.compile_seconds)
        for method, run, times in zip(methods, runs, step_ms, strict=True)
    ]


def _batches(settings: Settings, dataset: Dataset) -> Callable[[int], Batch]:
    indices = batch_indices(
        len(dataset.train_inputs), settings.batch_size, settings.steps, settings.seed
    )

    def batch(step: int) -> Batch:
        chosen = indices[step]
        return jnp.asarray(dataset.train_inputs[chosen]), jnp.asarray(dataset.train_targets[chosen])

    return batch


def _make_console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH_WITHOUT_TERMINAL)
    return console


def _opening(dataset: Dataset, settings: Settings) -> str:
    return (
        f"{dataset.description}. {len(dataset.train_inputs)} training and "
        f"{len(dataset.test_inputs)} test examples, {dataset.num_tasks} tasks. "
        f"Every method: {settings.steps} steps of adam({settings.learning_rate:g}), batches of "
        f"{settings.batch_size}, seed {settings.seed}, the same initial parameters and batches."
    )


class _Bars:
    """A progress bar for each phase; one line after each where nothing can be redrawn."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = TaskID(0)
        self._start = 0.0

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, description: str, total: int) -> None:
        self._start = time.perf_counter()
        self._task = self._progress.add_task(description, total=total)

    def rename(self, description: str) -> None:
        self._progress.update(self._task, description=description)

    def advance(self) -> None:
        self._progress.advance(self._task)

    def end(self, description: str) -> None:
        self.rename(description)
        if not self._console.is_terminal:
            seconds = time.perf_counter() - self._start
            self._console.print(f"{description}: {seconds:.1f} s", highlight=False)
