"""The explanations take what the engines take, in the same words."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import pytest

import jaxjd
from jaxjd.autodiff import total_multiplications
from jaxjd.linalg.factored import FactoredLeaf
from tests.jaxprs import multiplications

step_of = functools.partial(jaxjd.diagnostics.explain_step, compile=False, quiet=True)
leaves_of = functools.partial(jaxjd.diagnostics.explain_jacobian, quiet=True)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


TRUNK, HEADS, X = array(64, 128), {"a": array(128, 3), "b": array(128, 3)}, array(16, 64)


def head(name):
    def loss(trunk, heads, x):
        return jnp.mean((jnp.tanh(x @ trunk) @ heads[name] - 1.0) ** 2)

    return loss


FNS = {"a": head("a"), "b": head("b")}


def together(trunk, heads, x):
    return {name: fn(trunk, heads, x) for name, fn in FNS.items()}


def test_a_dict_of_functions_is_the_function_of_all():
    arguments = TRUNK, HEADS, X
    assert step_of(FNS, *arguments) == step_of(together, *arguments)
    assert leaves_of(FNS, *arguments) == leaves_of(together, *arguments)
    with_aux = [
        lambda *args, fn=fn: (fn(*args), {"x": args[-1], "name": "x"}) for fn in FNS.values()
    ]
    report = step_of(with_aux, *arguments, has_aux=True)
    assert report.shares == step_of(together, *arguments).shares
    with pytest.raises(ValueError, match="`fn` must be a function, got dict"):
        step_of({}, TRUNK)


@pytest.mark.parametrize("argnums", [1, (0, 1), (-2, -3)])
def test_the_chosen_arguments_are_differentiated(argnums):
    arguments = TRUNK, HEADS, X
    chosen = [arguments[number] for number in ([argnums] if argnums == 1 else argnums)]
    paths = ["a", "b"] if argnums == 1 else ["0", "1/a", "1/b"]
    if argnums == (-2, -3):
        paths = ["0/a", "0/b", "1"]
    report = step_of(together, *arguments, argnums=argnums)
    assert [leaf.path for leaf in report.leaves] == paths
    assert [leaf.shape for leaf in report.leaves] == [x.shape for x in jax.tree.leaves(chosen)]
    assert report.leaves == leaves_of(together, *arguments, argnums=argnums)
    gradient = jax.grad(lambda *args: sum(together(*args).values()), argnums)
    assert report.plain.multiplications == multiplications(jax.make_jaxpr(gradient)(*arguments))
    init, apply = jaxjd.aggregated_value_and_grad(FNS, jaxjd.weightings.sum(), argnums=argnums)
    step = functools.partial(apply, init(chosen[0] if argnums == 1 else tuple(chosen)))
    own = step_of(FNS, *arguments, argnums=argnums, step=step)
    wanted = total_multiplications(jax.make_jaxpr(step)(*arguments))
    assert own.step.multiplications == wanted


def one_loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["kernel"]) @ params["out"] - y) ** 2)


PARAMS = {"kernel": array(64, 128), "out": array(128, 4)}
WORDS = {
    "per_example": (jaxjd.per_example_value_and_jacobian, jaxjd.per_example_value_and_gramian),
    "per_task": (jaxjd.per_task_value_and_jacobian, jaxjd.per_task_value_and_gramian),
}
ROWS = {"per_example": (), "per_task": (6,)}


@pytest.mark.parametrize("word", WORDS)
def test_one_loss_per_example_or_task(word):
    batch = array(8, *ROWS[word], 64), array(8, *ROWS[word], 4)
    to_jacobian, to_gramian = WORDS[word]
    report = step_of(one_loss, PARAMS, *batch, **{word: True})
    assert report.shares == []
    assert report.leaves == leaves_of(one_loss, PARAMS, *batch, **{word: True})

    def is_factored(*args):
        _, jacobian = to_jacobian(one_loss, form="auto")(*args)
        found.update({name: isinstance(leaf, FactoredLeaf) for name, leaf in jacobian.items()})

    found = {}
    jax.eval_shape(is_factored, PARAMS, *batch)
    assert {leaf.path: leaf.form == "factored" for leaf in report.leaves} == found
    assert any(found.values())

    def plain(params, *batch):
        return jnp.sum(jax.vmap(functools.partial(one_loss, params))(*batch))

    def whole(params, *batch):
        _, gramian, pullback = to_gramian(one_loss)(params, *batch)
        return pullback(gramian.sum(axis=0))

    for cost, fn in ((report.plain, jax.grad(plain)), (report.step, whole)):
        assert cost.multiplications == multiplications(jax.make_jaxpr(fn)(PARAMS, *batch))
    assert "pulled back" not in str(report)
    with_aux = lambda *args: (one_loss(*args), {"y": args[-1], "name": "x"})
    assert step_of(with_aux, PARAMS, *batch, has_aux=True, **{word: True}) == report


def test_the_words_and_defaults_are_those_of_the_engines():
    engine = inspect.signature(jaxjd.value_and_gramian).parameters
    for explain in (jaxjd.diagnostics.explain_step, jaxjd.diagnostics.explain_jacobian):
        own = inspect.signature(explain).parameters
        shared = set(engine) & set(own)
        assert shared >= {"argnums", "has_aux", "form"}
        assert {name: own[name].default for name in shared} == {
            name: engine[name].default for name in shared
        }
    in_chunks = step_of(together, TRUNK, HEADS, X, chunk_size=1)
    assert in_chunks.leaves == step_of(together, TRUNK, HEADS, X).leaves
