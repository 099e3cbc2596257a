"""The explanation of a whole step: what it costs, what its losses share, and what is known."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxjd
from jaxjd.autodiff import total_multiplications
from tests.jaxprs import multiplications

N, WIDTH, OUT = 5, 12, 3
explain = functools.partial(jaxjd.diagnostics.explain_step, quiet=True)
traced = functools.partial(explain, compile=False)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def heads(params, x):
    """The first two losses read the second layer, the third one the first."""
    first = jnp.tanh(x @ params["trunk"][0])
    second = jnp.tanh(first @ params["trunk"][1])
    tops = zip([second, second, first], params["heads"], strict=True)
    return [jnp.mean((top @ kernel) ** 2) for top, kernel in tops]


PARAMS = {"trunk": [array(WIDTH, WIDTH)] * 2, "heads": [array(WIDTH, OUT)] * 3}
X = array(N, WIDTH)


def found(report):
    return {share.losses: (share.multiplications, share.passes) for share in report.shares}


def test_what_losses_share_and_own():
    layer, head = N * WIDTH * WIDTH, N * WIDTH * OUT
    assert found(traced(heads, PARAMS, X)) == {
        (0, 1, 2): (layer, 3),
        (0, 1): (layer, 2),
        (0,): (head, 1),
        (1,): (head, 1),
        (2,): (head, 1),
    }


def test_entries_along_an_axis_belong_to_their_losses():
    def losses(kernel, xs, frozen):
        return jax.vmap(lambda x: jnp.var(jnp.tanh(x @ frozen) @ kernel))(xs)

    report = traced(losses, array(WIDTH, OUT), array(4, N, WIDTH), array(WIDTH, WIDTH))
    own = {(task,): (N * WIDTH * OUT, 1) for task in range(4)}
    assert found(report) == {**own, (): (4 * N * WIDTH * WIDTH, 0)}  # No gradient passes.


@pytest.mark.parametrize("form", ["auto", "dense"])
def test_what_is_not_taken_apart_is_pulled_back_for_every_loss(form):
    layers = lambda params, x: jnp.mean((jnp.tanh(x @ params[0]) @ params[1]) ** 2, axis=0)
    report = traced(layers, [array(WIDTH, WIDTH), array(WIDTH, OUT)], X, form=form)
    assert {share.passes for share in report.shares} == {OUT}
    if form == "dense":
        shares = traced(heads, PARAMS, X, form=form).shares
        assert {share.passes for share in shares} == {3}


def recurrent(kernel, x):
    state = lax.scan(lambda h, _: (jnp.tanh(h @ kernel), None), x, length=7)[0]
    return jnp.mean(state, axis=0)[:2]


def conditional(kernel, x):
    branches = (lambda x: x @ kernel @ kernel, lambda x: x @ kernel)
    return jnp.mean(lax.cond(x[0, 0] > 0, *branches, x), axis=0)[:2]


def convolution(kernel, x):
    found = lax.conv_general_dilated(x[:, None], kernel[:OUT, None, :4], (1,), "SAME")
    return jnp.mean(found, axis=(0, 2))


def jitted(kernel, x):
    return jnp.mean(jax.jit(jnp.dot)(x, kernel), axis=0)[:2]


@pytest.mark.parametrize("losses", [recurrent, convolution, jitted])
def test_multiplications_are_counted_as_often_as_loops_run(losses):
    args = array(WIDTH, WIDTH), X
    report = traced(losses, *args)
    forward = multiplications(jax.make_jaxpr(losses)(*args).jaxpr)
    assert sum(share.multiplications for share in report.shares) == forward
    gradient = jax.grad(lambda *args: losses(*args).sum())
    assert report.plain.multiplications == multiplications(jax.make_jaxpr(gradient)(*args).jaxpr)
    assert report.ratio.multiplications > 1


def test_multiplications_of_conditionals_and_of_what_is_not_used():
    product = N * WIDTH * WIDTH
    args = array(WIDTH, WIDTH), X
    assert total_multiplications(jax.make_jaxpr(conditional)(*args)) == 2 * product

    def unused(kernel, x):
        jitted = jax.jit(lambda: (x @ kernel @ kernel, x.sum()))
        return jitted()[1]

    assert total_multiplications(jax.make_jaxpr(unused)(*args)) == 0


def test_figures_are_those_of_the_compiled_programs(capsys):
    init, apply = jaxjd.aggregated_value_and_grad(heads, jaxjd.weightings.sum())
    step = functools.partial(apply, init(PARAMS))
    report = jaxjd.diagnostics.explain_step(heads, PARAMS, X, step=step)
    compiled = jax.jit(step).lower(PARAMS, X).compile()
    analysis = compiled.cost_analysis()
    assert report.step.flops == analysis["flops"]
    assert report.step.bytes == analysis["bytes accessed"]
    assert report.step.temporaries == compiled.memory_analysis().temp_size_in_bytes
    plain = jax.value_and_grad(lambda params, x: sum(heads(params, x)))
    flops = jax.jit(plain).lower(PARAMS, X).compile().cost_analysis()["flops"]
    assert report.plain.flops == pytest.approx(flops, rel=0.02)  # It returns the losses, too.
    assert report.ratio.flops == report.step.flops / report.plain.flops
    leaves = jaxjd.diagnostics.explain_jacobian(heads, PARAMS, X, quiet=True)
    assert report.leaves == leaves
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    (line,) = [line for line in printed.splitlines() if line.startswith("each of 0, 1, 2 ")]
    assert line.split()[-2:] == ["180", "once"]
    assert f"{report.ratio.flops:.2f}" in printed


def test_without_compiling_and_without_a_backend_that_tells(monkeypatch):
    report = traced(heads, PARAMS, X)
    unknown = (None, None, None)
    assert report.plain[1:] == report.step[1:] == report.ratio[1:] == unknown
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), (PARAMS, X))
    assert traced(heads, *ones) == report
    for method in ("cost_analysis", "memory_analysis"):
        monkeypatch.setattr(jax.stages.Compiled, method, lambda self: None)
    assert explain(heads, PARAMS, X) == report
    assert str(report).splitlines()[3].split()[2:] == ["-"] * 3
    monkeypatch.setattr(jax.stages.Compiled, "cost_analysis", lambda self: {"flops": -1.0})
    assert explain(heads, PARAMS, X).step[1:] == unknown


def test_auxiliary_output_of_any_kind():
    def losses(params, x):
        return heads(params, x), {"name": "x", "mean": x.mean()}

    report = traced(losses, PARAMS, X, has_aux=True)
    assert found(report)[(0, 1, 2)] == (N * WIDTH * WIDTH, 3)
    assert report.step.multiplications == traced(heads, PARAMS, X).step.multiplications


def test_many_losses_are_one_line():
    report = traced(lambda w, x: jnp.mean(x @ w, axis=1), array(WIDTH, OUT), array(64, WIDTH))
    (line,) = [line for line in str(report).splitlines() if "0 to 63" in line]
    assert line.startswith("each of 0 to 63 ")
    assert line.endswith("once")


def test_products_in_conditionals_make_it_pay_to_take_losses_apart():
    def losses(kernel, xs):
        branches = (lambda x: jnp.tanh(x @ kernel), lambda x: x @ kernel)
        return [jnp.mean(lax.cond(x[0, 0] > 0, *branches, x) ** 2) for x in xs]

    args = jnp.eye(WIDTH), [jnp.full((N, WIDTH), sign) for sign in (1.0, -0.5, 0.25)]
    shares = traced(losses, *args).shares
    own = [share for share in shares if len(share.losses) == 1]
    assert [share.multiplications for share in own] == [N * WIDTH * WIDTH] * 3
    assert [share.passes for share in own] == [1, 1, 1]
    jacobian = jaxjd.value_and_jacobian(losses, form="auto")(*args)[1]
    wanted = jnp.stack(jax.jacrev(losses)(*args))
    assert jnp.allclose(jaxjd.materialize(jacobian), wanted, rtol=1e-5, atol=1e-6)
