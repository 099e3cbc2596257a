import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxjd.demo import cli, data, models, results, train

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")
pytest.importorskip("river")

METHOD_KEYS = {
    "name",
    "test_accuracies",
    "test_accuracy_mean",
    "test_accuracy_worst",
    "test_losses",
    "train_losses",
    "step_ms",
    "step_ms_quartiles",
    "step_ratio",
    "compile_seconds",
    "conflict_share",
    "conflicting_pairs_share",
    "direction_raises_share",
    "update_raises_share",
    "curves",
}
TIMES = {"step_ms", "step_ms_quartiles", "step_ratio", "compile_seconds"}
CONTENT_KEYS = {
    "settings",
    "versions",
    "machine",
    "data",
    "definitions",
    "methods",
    "summary",
    "seconds",
}
NUM_TASKS = {"multimnist": 2, "yeast": 14}


@pytest.fixture(scope="module", params=["multimnist", "yeast"])
def dataset(request):
    return data.DATASETS[request.param].load(0)


def run_demo(out, *options):
    assert cli.main(["--steps", "3", "--batch-size", "8", "--out", str(out), *options]) == 0


def read_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# Data


def test_shapes(dataset):
    source = data.DATASETS[dataset.name]
    shape = {"multimnist": (36, 36), "yeast": (103,)}[dataset.name]
    assert dataset.train_inputs.shape == (source.num_train, *shape)
    assert dataset.test_inputs.shape[1:] == shape
    assert dataset.num_tasks == NUM_TASKS[dataset.name]
    for part in ("train", "test"):
        inputs, targets = getattr(dataset, f"{part}_inputs"), getattr(dataset, f"{part}_targets")
        assert targets.shape == (len(inputs), dataset.num_tasks)
        assert targets.dtype == np.int32


def test_no_original_is_in_both_parts(dataset):
    originals = {"multimnist": data.NUM_DIGITS, "yeast": data.NUM_GENES}[dataset.name]
    train_ids, test_ids = np.unique(dataset.train_sources), np.unique(dataset.test_sources)
    assert np.intersect1d(train_ids, test_ids).size == 0
    assert len(train_ids) + len(test_ids) == originals


def test_the_seed_decides_the_data(dataset):
    source = data.DATASETS[dataset.name]
    same, other = source.load(0), source.load(1)
    np.testing.assert_array_equal(same.train_inputs, dataset.train_inputs)
    np.testing.assert_array_equal(same.test_targets, dataset.test_targets)
    assert not np.array_equal(other.test_sources, dataset.test_sources)


def test_every_class_is_in_both_parts():
    multimnist = data.load_multimnist(0)
    for targets in (multimnist.train_targets, multimnist.test_targets):
        for column in targets.T:
            assert set(column) == set(range(10))


def test_digits_lie_at_their_corners():
    images = np.zeros((2, 28, 28), np.uint8)
    images[0, 0, 0], images[0, 20, 20] = 7, 5
    images[1, 27, 27], images[1, 12, 12] = 9, 6
    (canvas,) = data.overlay(images, np.array([[0, 1]]))
    assert (canvas[0, 0], canvas[35, 35]) == (7, 9)
    assert canvas[20, 20] == 6, "the brighter of the two"
    assert canvas.sum() == 7 + 9 + 6


def test_yeast_is_standardized_by_the_training_set():
    yeast = data.load_yeast(0)
    np.testing.assert_allclose(yeast.train_inputs.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(yeast.train_inputs.std(axis=0), 1, rtol=1e-4)
    assert np.abs(yeast.test_inputs.mean(axis=0)).max() > 1e-3


def test_majority_rates():
    yeast = data.load_yeast(0)
    rates = yeast.majority_rates()
    assert rates.shape == (14,)
    positive = yeast.test_targets.mean(axis=0)
    np.testing.assert_allclose(np.sort(rates), np.sort(np.maximum(positive, 1 - positive)))


def test_an_epoch_repeats_nothing():
    indices = data.batch_indices(num_examples=10, batch_size=3, num_steps=7, seed=0)
    assert indices.shape == (7, 3)
    for epoch in (indices[:3], indices[3:6]):
        assert np.unique(epoch).size == 9
    np.testing.assert_array_equal(indices, data.batch_indices(10, 3, 7, seed=0))


# Models


def test_patches_make_a_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (4, 4, 3, 5))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # A patch is four blocks of 2 x 2 pixels, one after the other.
    blocks = kernel.reshape(2, 2, 2, 2, 3, 5).transpose(0, 2, 1, 3, 4, 5).reshape(-1, 5)
    np.testing.assert_allclose(models._patches(x, 2) @ blocks, expected, rtol=1e-4, atol=1e-4)


def test_models(dataset):
    model = models.make_model(dataset)
    params = jax.jit(model.init)(jax.random.key(0))
    batch = (dataset.test_inputs[:4], dataset.test_targets[:4])
    assert jax.jit(model.losses)(params, *batch).shape == (dataset.num_tasks,)
    assert jax.jit(model.correct)(params, *batch).shape == (4, dataset.num_tasks)
    shared, all_layers = models.trunk(params), set(params)
    assert 0 < len(shared) < len(all_layers)


# Training


def quadratics(centres):
    """Two losses of one parameter vector, whose gradients at 0 are minus the centres."""

    def losses_fn(params, inputs, targets):
        return jnp.stack([jnp.sum((params["w"]["kernel"] - c) ** 2) / 2 for c in centres])

    return losses_fn


@pytest.mark.parametrize(
    ("centres", "conflict", "direction_raises"),
    [
        ([[1.0, 0.0], [1.0, 1.0]], False, False),
        ([[1.0, 1.0], [-0.5, 1.0]], False, False),
        ([[4.0, 1.0], [-1.0, 1.0]], True, True),
    ],
)
def test_measures_of_the_plain_mean(centres, conflict, direction_raises):
    params = {"w": {"kernel": jnp.zeros(2)}}
    batch = (jnp.zeros(1), jnp.zeros(1))
    method = train.make_method(
        train.BASELINE, quadratics(jnp.array(centres)), 2, 0.1, 0, params, batch
    )
    _, measures = train.train(method, params, lambda i: batch, num_steps=1)
    first, second = map(np.array, centres)
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    np.testing.assert_allclose(measures.min_cosine, [cosine], rtol=1e-6)
    np.testing.assert_allclose(measures.mean_cosine, [cosine], rtol=1e-6)
    assert (measures.min_cosine[0] < 0) == conflict
    assert measures.direction_raises[0] == direction_raises


@pytest.mark.parametrize("name", train.AGGREGATORS)
def test_every_aggregator_can_be_made(name):
    """Traced only: the numbers are other tests'."""
    params = {"w": {"kernel": jnp.zeros(2)}}
    jacobian = {"w": {"kernel": jnp.array([[4.0, 1.0], [-1.0, 1.0]])}}
    tx = train.AGGREGATORS[name](2, 0)
    update = lambda jacobian: tx.update(jacobian, tx.init(params), params)[0]
    assert jax.eval_shape(update, jacobian)["w"]["kernel"].shape == (2,)


@pytest.mark.parametrize(
    "name", [train.BASELINE, "mean", pytest.param("pcgrad", marks=pytest.mark.slow)]
)
def test_measuring_changes_nothing(name):
    centres = jnp.array([[4.0, 1.0], [-1.0, 1.0]])
    params = {"w": {"kernel": jnp.zeros(2)}}
    batch = (jnp.zeros(1), jnp.zeros(1))
    method = train.make_method(name, quadratics(centres), 2, 0.1, 0, params, batch)
    trained, measures = train.train(method, params, lambda i: batch, num_steps=3)

    plain, state = params, method.state
    for _ in range(3):
        plain, state, losses = method.step(plain, state, batch)
    np.testing.assert_allclose(trained["w"]["kernel"], plain["w"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(measures.losses[-1], losses, rtol=1e-5)


@pytest.mark.slow
def test_upgrad_raises_no_loss_where_the_plain_mean_does():
    centres = jnp.array([[4.0, 1.0], [-1.0, 1.0]])
    params = {"w": {"kernel": jnp.zeros(2)}}
    batch = (jnp.zeros(1), jnp.zeros(1))
    method = train.make_method("upgrad", quadratics(centres), 2, 0.1, 0, params, batch)
    _, measures = train.train(method, params, lambda i: batch, num_steps=3)
    assert not measures.direction_raises.any()


def make_result(name, correct, losses=((1.0, 2.0), (0.5, 1.0))):
    losses = np.array(losses)
    zeros = np.zeros(len(losses))
    measures = train.Measures(losses, zeros, zeros, zeros, zeros > 0, zeros > 0)
    run = train.Run(measures, losses[-1], np.array(correct))
    return results.Result(name, run, np.array([1.0, 2.0, 3.0]), 0.5)


@pytest.fixture
def hard_dataset():
    """Four test examples of two tasks, of which the majority answers a half right."""
    inputs, sources = np.zeros((4, 1), np.float32), np.arange(4)[:, None]
    train_targets, test_targets = np.zeros((4, 2), np.int32), np.array([[0, 1]] * 4, np.int32)
    return data.Dataset(
        "hard", "Hard", ("a", "b"), inputs, train_targets, sources, inputs, test_targets, sources
    )


def test_the_summary_praises_nothing_that_did_not_win(hard_dataset):
    plain = make_result(train.BASELINE, [[True, True], [True, True], [True, False]])
    upgrad = make_result("upgrad", [[True, True], [True, True], [False, False]])
    accuracy, direction, update, cost = results.summarize(hard_dataset, [plain, upgrad])
    assert "0 of 1 aggregators ended above the plain mean (83.3 %)" in accuracy
    assert "upgrad, reached 66.7 %, -16.7 points" in accuracy
    assert "one seed" in accuracy
    assert direction == "No method's direction raised any loss to first order, in any step."
    assert "in 0.0 % of the steps" in update
    assert cost == "A step took 1.00 (upgrad) times that of the plain mean."


def test_the_summary_tells_of_failures(hard_dataset):
    plain = make_result(train.BASELINE, [[True, True]])
    bad = make_result("pcgrad", [[False, False]], losses=((1.0, 1.0), (math.nan, math.inf)))
    *_, below, diverged = results.summarize(hard_dataset, [plain, bad])
    assert "commonest class (50.0 %)" in below
    assert below.endswith("say nothing: pcgrad.")
    assert diverged.endswith("not finite: pcgrad.")


def test_curves_are_moving_averages():
    losses = np.stack([np.arange(40.0), np.ones(40)], axis=1)
    curves = results.curves(make_result("upgrad", [[True, True]], losses))
    np.testing.assert_allclose(curves.losses[:, 0], np.arange(39) + 0.5)
    np.testing.assert_allclose(curves.losses[:, 1], 1)
    np.testing.assert_allclose(curves.step, np.arange(39) + 1.5)


# The command line


@pytest.mark.slow
@pytest.mark.parametrize(("name", "aggregator"), [("multimnist", "upgrad"), ("yeast", "pcgrad")])
def test_end_to_end(name, aggregator, tmp_path, capsys):
    run_demo(tmp_path, "--data", name, "--aggregators", aggregator)
    printed = capsys.readouterr().out
    for word in ("plain mean", aggregator, "majority", "conflict", "one seed"):
        assert word in printed
    assert len(printed.splitlines()) < 50, "no bar is redrawn where there is no terminal"

    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    content = read_json(tmp_path / f"{name}.json")
    assert set(content) == CONTENT_KEYS
    assert content["settings"] == {
        "data": name,
        "aggregators": [aggregator],
        "steps": 3,
        "batch_size": 8,
        "learning_rate": 2e-3,
        "seed": 0,
        "out": str(tmp_path),
    }
    plain, aggregated = content["methods"]
    assert (plain["name"], aggregated["name"]) == ("plain mean", aggregator)
    tasks = content["data"]["tasks"]
    assert len(tasks) == len(content["data"]["majority_accuracies"]) == NUM_TASKS[name]
    for method in (plain, aggregated):
        assert set(method) == METHOD_KEYS
        for key in ("test_accuracies", "test_losses", "train_losses"):
            assert len(method[key]) == len(tasks)
        numbers = [x for key in METHOD_KEYS - {"name", "curves"} for x in np.ravel(method[key])]
        assert np.all(np.isfinite(np.array(numbers, float)))
        for share in (key for key in METHOD_KEYS if key.endswith("_share")):
            assert 0 <= method[share] <= 1
        assert len(method["curves"]["step"]) == len(method["curves"]["losses"]) == 3
    assert plain["step_ratio"] == 1
    first_losses = [method["curves"]["losses"][0] for method in (plain, aggregated)]
    np.testing.assert_allclose(first_losses[1], first_losses[0], rtol=1e-5)

    if name == "yeast":
        run_demo(tmp_path / "again", "--data", name, "--aggregators", aggregator)
        again = read_json(tmp_path / "again" / f"{name}.json")
        for method, repeated in zip(content["methods"], again["methods"], strict=True):
            assert {k: method[k] for k in METHOD_KEYS - TIMES} == {
                k: repeated[k] for k in METHOD_KEYS - TIMES
            }


def test_a_diverged_run_is_still_json(tmp_path):
    from jaxjd.demo import report

    plain = make_result(train.BASELINE, [[True, True]])
    bad = make_result("pcgrad", [[False, False]], losses=((1.0, 1.0), (math.nan, math.inf)))
    content = report.as_json({}, data.load_yeast(0), [plain, bad], 1.0)
    assert set(content) == CONTENT_KEYS
    report.save_json(tmp_path / "bad.json", content)
    assert read_json(tmp_path / "bad.json") == content
    assert content["methods"][1]["test_losses"] == [None, None]
    assert "not finite: pcgrad" in content["summary"][-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "mnist"], "unknown data set 'mnist': choose from multimnist, yeast"),
        (["--aggregators", "upgrad,adam"], "unknown aggregator 'adam': choose from upgrad, "),
        (["--aggregators", ""], "unknown aggregator ''"),
        (["--aggregators", "mgda,mgda"], "named twice: mgda"),
        (["--steps", "0"], "--steps: expected an integer at least 1, found '0'"),
        (["--steps", "many"], "--steps: expected an integer at least 1, found 'many'"),
        (["--batch-size", "-2"], "--batch-size: expected an integer at least 1, found '-2'"),
        (["--batch-size", "20001"], "20001 is more than the 20000 training examples"),
        (["--data", "yeast", "--batch-size", "1501"], "1501 is more than the 1500 training"),
        (["--learning-rate", "0"], "--learning-rate: expected a finite positive number"),
        (["--learning-rate", "nan"], "--learning-rate: expected a finite positive number"),
        (["--seed", "-1"], "--seed: expected an integer from 0 to 2147483647, found '-1'"),
        (["--seed", "2147483648"], "--seed: expected an integer from 0 to 2147483647"),
        (["--speed", "3"], "unrecognized arguments: --speed 3"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit) as failure:
        cli.main(options)
    assert failure.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("python -m jaxjd.demo: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("below", [False, True])
def test_out_that_is_a_file(below, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(SystemExit) as failure:
        cli.main(["--out", str(file / "deep" if below else file)])
    assert failure.value.code == 2
    error = capsys.readouterr().err
    assert f"argument --out: cannot make the directory {file}" in error
    assert error.count("\n") == 1
    assert file.read_text() == "mine"


@pytest.mark.parametrize("package", ["rich", "matplotlib", "mlxtend"])
def test_a_missing_extra(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as failure:
        cli.main([])
    assert failure.value.code == 1
    error = capsys.readouterr().err
    assert f'the demo needs {package}: pip install "jaxjd[demo]"' in error
    assert error.count("\n") == 1


def test_the_module_runs():
    help_text = subprocess.run(
        [sys.executable, "-m", "jaxjd.demo", "--help"], check=True, capture_output=True, text=True
    ).stdout
    for option in ("data", "aggregators", "steps", "batch-size", "learning-rate", "seed", "out"):
        assert f"--{option} " in help_text
    for name in (*data.DATASETS, *train.AGGREGATORS):
        assert name in help_text
