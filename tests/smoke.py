"""Imports an installed jaxjd, without any extra, and trains with it: `python tests/smoke.py`."""

import jax
import jax.numpy as jnp
import optax

import jaxjd


def losses_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 2, axis=0)


def main():
    key_w, key_x, key_y = jax.random.split(jax.random.key(0), 3)
    params = {"w": 0.1 * jax.random.normal(key_w, (4, 3))}
    x, y = jax.random.normal(key_x, (32, 4)), jnp.tanh(jax.random.normal(key_y, (32, 3)))
    tx = jaxjd.skip_if_not_finite(optax.chain(jaxjd.upgrad(num_tasks=3), optax.adam(1e-2)))

    @jax.jit
    def step(params, state):
        losses, jacobian = jaxjd.value_and_jacobian(losses_fn, form="auto")(params, x, y)
        updates, state = tx.update(jacobian, state, params)
        return optax.apply_updates(params, updates), state, losses

    state = tx.init(params)
    first = losses_fn(params, x, y)
    for _ in range(100):
        params, state, losses = step(params, state)
    assert bool(jnp.all(losses < first)), (first, losses)
    print(f"jaxjd {jaxjd.__version__}, jax {jax.__version__}: {first} -> {losses}")


if __name__ == "__main__":
    main()
