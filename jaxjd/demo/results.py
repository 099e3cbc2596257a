"""The numbers of a run of the demo, and what they say in words."""

import math
from typing import NamedTuple

import numpy as np

from jaxjd.demo.data import Dataset
from jaxjd.demo.train import Run

_NUM_CURVE_POINTS = 100


class Result(NamedTuple):
    """All numbers of one method.

    Attributes:
        name: The aggregator's name, or that of the baseline.
        run: The training run.
        step_ms: Milliseconds of single timed steps.
        compile_seconds: Time to trace and compile the step.
    """

    name: str
    run: Run
    step_ms: np.ndarray
    compile_seconds: float

    @property
    def train_losses(self) -> np.ndarray:
        """Training loss of each task, mean over the last twentieth of the steps."""
        losses = self.run.measures.losses
        return losses[-math.ceil(len(losses) / 20) :].mean(axis=0)

    @property
    def median_ms(self) -> float:
        """Median milliseconds of a step."""
        return float(np.median(self.step_ms))

    @property
    def mean_accuracy(self) -> float:
        """Test accuracy, mean over the tasks."""
        return float(self.run.test_accuracies.mean())

    @property
    def conflict_share(self) -> float:
        """Share of steps in which two tasks' gradients conflicted."""
        return float(np.mean(self.run.measures.conflicting_pairs > 0))

    @property
    def conflicting_pairs_share(self) -> float:
        """Share of pairs of tasks that conflicted, mean over the steps."""
        return float(np.mean(self.run.measures.conflicting_pairs))

    @property
    def direction_raises_share(self) -> float:
        """Share of steps whose direction, before adam, raised a loss to first order."""
        return float(np.mean(self.run.measures.direction_raises))

    @property
    def update_raises_share(self) -> float:
        """Share of steps whose update, after adam, raised a loss to first order."""
        return float(np.mean(self.run.measures.update_raises))

    @property
    def diverged(self) -> bool:
        """Whether a loss is not finite at the end."""
        return not np.all(np.isfinite(self.run.test_losses))


class Curves(NamedTuple):
    """The course of a training, smoothed and thinned to at most a hundred points.

    Attributes:
        step: Shape `(p,)`, the middle of each smoothing window, in steps from 1.
        losses: Shape `(p, m)`.
        mean_cosine: Shape `(p,)`.
        min_cosine: Shape `(p,)`.
    """

    step: np.ndarray
    losses: np.ndarray
    mean_cosine: np.ndarray
    min_cosine: np.ndarray


def curves(result: Result) -> Curves:
    """Moving averages over a twentieth of the training."""
    measures = result.run.measures
    num_steps = len(measures.losses)
    width = max(1, num_steps // 20)
    count = num_steps - width + 1
    kept = np.unique(np.linspace(0, count - 1, min(count, _NUM_CURVE_POINTS)).astype(int))

    def smooth(series: np.ndarray) -> np.ndarray:
        return np.convolve(series, np.full(width, 1 / width), mode="valid")[kept]

    return Curves(
        step=kept + (width + 1) / 2,
        losses=np.stack([smooth(column) for column in measures.losses.T], axis=1),
        mean_cosine=smooth(measures.mean_cosine),
        min_cosine=smooth(measures.min_cosine),
    )


def summarize(dataset: Dataset, results: list[Result]) -> list[str]:
    """What was found, in sentences made from the numbers; the baseline is the first result."""
    sentences = [
        _accuracy_sentence(results),
        _direction_sentence(results),
        _update_sentence(results),
        _cost_sentence(results),
    ]
    majority = float(dataset.majority_rates().mean())
    below = [result.name for result in results if result.mean_accuracy <= majority]
    if below:
        sentences.append(
            f"No better than always answering the commonest class ({percent(majority)} %), so with "
            f"accuracies that say nothing: {_enumerate(below)}."
        )
    diverged = [result.name for result in results if result.diverged]
    if diverged:
        sentences.append(f"Ended with a loss that is not finite: {_enumerate(diverged)}.")
    return sentences


def percent(share: float) -> str:
    """A share in per cent with one decimal."""
    return f"{100 * share:.1f}"


def _accuracy_sentence(results: list[Result]) -> str:
    baseline, *aggregated = results
    best = max(aggregated, key=lambda result: result.mean_accuracy)
    ahead = sum(result.mean_accuracy > baseline.mean_accuracy for result in aggregated)
    difference, error = _paired_difference(best, baseline)
    return (
        f"Mean test accuracy: {ahead} of {len(aggregated)} aggregators ended above the "
        f"{baseline.name} ({percent(baseline.mean_accuracy)} %). The highest, {best.name}, reached "
        f"{percent(best.mean_accuracy)} %, {100 * difference:+.1f} points; two standard errors of "
        f"that on this test set are {200 * error:.1f}. It is one seed: another can differ."
    )


def _paired_difference(result: Result, baseline: Result) -> tuple[float, float]:
    """The difference of two mean accuracies, and its standard error over the test examples.

    The examples are paired, since both methods answered the same ones, and the tasks of an example
    are averaged first, since they are not independent.
    """
    differences = result.run.test_correct.mean(axis=1) - baseline.run.test_correct.mean(axis=1)
    return float(differences.mean()), float(differences.std() / math.sqrt(len(differences)))


def _direction_sentence(results: list[Result]) -> str:
    never = [result.name for result in results if result.direction_raises_share == 0]
    raised = [
        f"{result.name} ({percent(result.direction_raises_share)} %)"
        for result in results
        if result.direction_raises_share > 0
    ]
    if not raised:
        return "No method's direction raised any loss to first order, in any step."
    sentence = f"Steps whose direction raised some loss to first order: {_enumerate(raised)}."
    return f"{sentence} None: {_enumerate(never)}." if never else sentence


def _update_sentence(results: list[Result]) -> str:
    shares = {r.name: 100 * r.update_raises_share for r in results}
    return (
        "Adam's momentum and scaling change the direction: the update it makes raised some loss to "
        f"first order in {_extremes(shares, '.1f')} % of the steps."
    )


def _cost_sentence(results: list[Result]) -> str:
    baseline, *aggregated = results
    ratios = {r.name: r.median_ms / baseline.median_ms for r in aggregated}
    return f"A step took {_extremes(ratios, '.2f')} times that of the {baseline.name}."


def _extremes(values: dict[str, float], form: str) -> str:
    """The smallest and the largest value, with their names."""
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    if len(values) == 1:
        return f"{values[low]:{form}} ({low})"
    if values[low] == values[high]:
        return f"{values[low]:{form}}"
    return f"{values[low]:{form}} ({low}) to {values[high]:{form}} ({high})"


def _enumerate(items: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))
