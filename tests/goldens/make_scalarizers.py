"""Writes scalarizers.json: values and gradients of TorchJD's scalarizers, in float64.

Run it where torch and torchjd 0.18.0 are installed: ``python tests/goldens/make_scalarizers.py``.
The tests read the file and need neither.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib

import numpy as np
import torch
from torchjd import scalarization as T

OUTPUT = pathlib.Path(__file__).with_name("scalarizers.json")


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def derivative(scalarizer, losses) -> tuple[float, list]:
    """The value at these losses, and its gradient."""
    losses = tensor(losses).requires_grad_()
    value = scalarizer(losses)
    value.backward()
    return value.item(), losses.grad.tolist()


def make_losses(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Positive losses of many shapes and scales."""
    return {
        "scalar": np.array(1.7),
        "two": np.array([2.0, 0.5]),
        "four": rng.uniform(0.1, 3.0, 4),
        "matrix": rng.uniform(0.1, 3.0, (2, 3)),
        "cube": rng.uniform(0.1, 3.0, (2, 3, 4)),
        "unequal": 10.0 ** rng.uniform(-3, 3, 4),
        "small": 1e-4 * rng.uniform(0.1, 3.0, 4),
        "large": 1e4 * rng.uniform(0.1, 3.0, 4),
    }


def stateless(rng: np.random.Generator) -> list[dict]:
    cases = []

    def add(name: str, losses: np.ndarray, scalarizer, **arguments) -> None:
        value, gradient = derivative(scalarizer, losses)
        arguments = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in arguments.items()}
        cases.append(
            {
                "scalarizer": name,
                "arguments": arguments,
                "losses": losses.tolist(),
                "value": value,
                "gradient": gradient,
            }
        )

    for losses in make_losses(rng).values():
        shape, scale = losses.shape, float(np.max(losses))
        weights = rng.uniform(0.1, 2.0, shape)
        reference = -scale * rng.uniform(0.1, 1.0, shape)
        add("mean", losses, T.Mean())
        add("sum", losses, T.Sum())
        add("geometric_mean", losses, T.GeometricMean())
        add("constant", losses, T.Constant(tensor(weights)), weights=weights)
        for lambda_ in (0.0, 0.5, 8.0):
            add(
                "cosmos",
                losses,
                T.COSMOS(lambda_, tensor(weights)),
                lambda_=lambda_,
                weights=weights,
            )
        for mu in (0.01 * scale, 0.3 * scale, 5.0 * scale):
            add("stch", losses, T.STCH(mu), mu=mu)
            add(
                "stch",
                losses,
                T.STCH(mu, tensor(weights), tensor(reference)),
                mu=mu,
                weights=weights,
                reference=reference,
            )
        for theta in (0.0, 0.3, 5.0) if losses.size > 1 else ():
            # TorchJD adds 1e-12 to the squared distance; in this unit it does not show.
            distant = losses / scale * 10
            add("pbi", distant, T.PBI(theta, tensor(weights)), theta=theta, weights=weights)
            start = reference / scale
            add(
                "pbi",
                distant,
                T.PBI(theta, tensor(weights), tensor(start)),
                theta=theta,
                weights=weights,
                reference=start,
            )
    return cases


def learned(rng: np.random.Generator) -> list[dict]:
    cases = []
    for losses in make_losses(rng).values():
        for name, make, attribute in (("uw", T.UW, "log_var"), ("imtl_l", T.IMTLL, "log_scale")):
            for state in (np.zeros(losses.shape), rng.normal(size=losses.shape)):
                scalarizer = make(losses.shape)
                parameter = getattr(scalarizer, attribute)
                with torch.no_grad():
                    parameter.copy_(tensor(state))
                value, gradient = derivative(scalarizer, losses)
                cases.append(
                    {
                        "scalarizer": name,
                        "losses": losses.tolist(),
                        "state": state.ravel().tolist(),
                        "value": value,
                        "gradient": gradient,
                        "state_gradient": parameter.grad.flatten().tolist(),
                    }
                )
    return cases


def walk(rng: np.random.Generator, shape: tuple[int, ...], steps: int, scale: float) -> np.ndarray:
    """Losses of a training run: they fall, each at its rate, with noise."""
    start = scale * rng.uniform(0.5, 2.0, shape)
    rate = rng.uniform(0.7, 1.02, shape)
    noise = rng.uniform(0.9, 1.1, (steps, *shape))
    return start * rate ** np.arange(steps).reshape(-1, *[1] * len(shape)) * noise


def dwa(rng: np.random.Generator) -> list[dict]:
    cases = []
    for shape, temperature, steps_per_epoch, epochs, scale in (
        ((2,), 2.0, 1, 8, 1.0),
        ((4,), 0.5, 3, 5, 1e3),
        ((2, 3), 2.0, 2, 4, 1e-3),
        ((), 1.0, 2, 3, 1.0),
    ):
        losses = walk(rng, shape, steps_per_epoch * epochs, scale)
        scalarizer = T.DWA(temperature)
        results = []
        for step, row in enumerate(losses):
            results.append(derivative(scalarizer, row))
            if (step + 1) % steps_per_epoch == 0:
                scalarizer.step()
        cases.append(
            {
                "arguments": {"temperature": temperature, "steps_per_epoch": steps_per_epoch},
                "losses": losses.tolist(),
                "values": [value for value, _ in results],
                "gradients": [gradient for _, gradient in results],
            }
        )
    return cases


def famo(rng: np.random.Generator) -> list[dict]:
    cases = []
    for shape, bounded, lr, weight_decay, scale in (
        ((4,), False, 0.025, 1e-3, 1.0),
        ((4,), True, 0.1, 0.0, 1.0),
        ((2, 3), True, 0.025, 0.1, 1e3),
        ((4,), False, 1.0, 1e-2, 1e-2),
        ((), False, 0.025, 1e-3, 1.0),
    ):
        before = walk(rng, shape, 8, scale)
        after = before * rng.uniform(0.8, 1.05, before.shape)
        after[3] = before[3]  # A step that changes nothing.
        bounds = -scale * rng.uniform(0.5, 1.0, shape) if bounded else None
        scalarizer = T.FAMO(
            shape,
            min_losses=None if bounds is None else tensor(bounds),
            lr=lr,
            weight_decay=weight_decay,
        )
        results, logits = [], []
        for row, next_row in zip(before, after, strict=True):
            results.append(derivative(scalarizer, row))
            scalarizer.update(tensor(next_row))
            logits.append(scalarizer._w.detach().flatten().tolist())
        cases.append(
            {
                "arguments": {"lr": lr, "weight_decay": weight_decay},
                "min_losses": None if bounds is None else bounds.tolist(),
                "before": before.tolist(),
                "after": after.tolist(),
                "values": [value for value, _ in results],
                "gradients": [gradient for _, gradient in results],
                "logits": logits,
            }
        )
    return cases


def main() -> None:
    torch.set_default_dtype(torch.float64)
    version = importlib.metadata.version("torchjd")
    assert version == "0.18.0", version
    rng = np.random.default_rng(0)
    goldens = {
        "torchjd": version,
        "stateless": stateless(rng),
        "learned": learned(rng),
        "dwa": dwa(rng),
        "famo": famo(rng),
    }
    OUTPUT.write_text(json.dumps(goldens, separators=(",", ":")) + "\n")
    print({name: len(cases) for name, cases in goldens.items() if name != "torchjd"})


if __name__ == "__main__":
    main()
