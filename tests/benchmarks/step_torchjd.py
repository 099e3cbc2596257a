"""TorchJD's side of `tests.benchmarks.steps`: one variant of one case in a process of its own.

``python -m tests.benchmarks.step_torchjd CASE VARIANT`` builds the model and takes a step. Then it
answers every line with a number of seconds on its input by the times of the steps that it took in
about so many seconds, as a line of JSON, until its input ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.benchmarks.step_cases import CASES, RANK, Case, make_numbers

MEGABYTE = 1e6


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _linear(numbers: dict[str, np.ndarray] | np.ndarray) -> nn.Linear:
    named = isinstance(numbers, dict)
    kernel = numbers["kernel"] if named else numbers
    layer = nn.Linear(*kernel.shape, bias=named)
    layer.weight.data = _tensor(kernel.T)
    if named:
        layer.bias.data = _tensor(numbers["bias"])
    return layer


class _Residual(nn.Module):
    def __init__(self, numbers: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.linear = _linear(numbers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.tanh(self.linear(x))


class _Block(nn.Module):
    def __init__(self, numbers: dict[str, Any], heads: int) -> None:
        super().__init__()
        width = len(numbers["norm_1"]["scale"])
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = _linear(numbers["qkv"]), _linear(numbers["out"])
        self.up, self.down = _linear(numbers["up"]), _linear(numbers["down"])
        self.gelu = nn.GELU(approximate="tanh")
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0], x.shape[1], 3, self.heads, x.shape[2] // self.heads)
        query, key, value = self.qkv(self.norm_1(x)).reshape(shape).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / shape[-1] ** 0.5
        attended = (scores.softmax(-1) @ value).transpose(1, 2).reshape(x.shape)
        x = x + self.out(attended)
        return x + self.down(self.gelu(self.up(self.norm_2(x))))


class _Adapted(nn.Module):
    def __init__(self, base: np.ndarray, pair: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.register_buffer("base", _tensor(base.T))
        self.down = nn.Linear(len(base), RANK, bias=False)
        self.up = nn.Linear(RANK, base.shape[1], bias=False)
        self.down.weight.data = _tensor(pair["down"].T)
        self.up.weight.data = _tensor(pair["up"].T)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.base) + self.up(self.down(x))


class _Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def _cnn(params: dict[str, Any]) -> nn.Module:
    convolutions = []
    for numbers in params["convolutions"]:
        kernel = numbers["kernel"]
        layer = nn.Conv2d(kernel.shape[2], kernel.shape[3], 3)
        layer.weight.data = _tensor(kernel.transpose(3, 2, 0, 1))
        layer.bias.data = _tensor(numbers["bias"])
        convolutions.append(layer)
    hidden, out = params["dense"]
    channels = convolutions[-1].out_channels
    # Images are (channels, height, width) here.
    side = round((len(hidden["kernel"]) / channels) ** 0.5)
    kernel = hidden["kernel"].reshape(side, side, channels, -1).transpose(2, 0, 1, 3)
    hidden = {"kernel": kernel.reshape(side * side * channels, -1), "bias": hidden["bias"]}
    return nn.Sequential(
        convolutions[0],
        nn.ELU(),
        convolutions[1],
        nn.MaxPool2d(2),
        nn.ELU(),
        convolutions[2],
        nn.MaxPool2d(3),
        nn.ELU(),
        nn.Flatten(),
        _linear(hidden),
        nn.ELU(),
        _linear(out),
    )


def _trunk(case: Case, params: dict[str, Any], batch: dict[str, Any]) -> nn.Module:
    layers: list[nn.Module] = []
    if case.kind == "adapters":
        for base, pair in zip(batch["base"], params["trunk"], strict=True):
            layers += [_Adapted(base, pair), nn.ReLU()]
        return nn.Sequential(*layers)
    if case.kind == "pinn":
        for numbers in params["trunk"]:
            layers += [_linear(numbers), nn.Tanh()]
        return nn.Sequential(*layers[:-1])
    if case.kind in ("mlp", "features", "heads", "own", "stacked"):
        for kernel in params["trunk"]:
            layers += [_linear(kernel), nn.ReLU()]
        return nn.Sequential(*layers)
    if case.kind == "tensors":
        return nn.Sequential(*map(_Residual, params["trunk"]))
    if case.kind == "transformer":
        blocks = [_Block(numbers, case.heads) for numbers in params["trunk"]["layers"]]
        return nn.Sequential(*blocks, nn.LayerNorm(case.width), _Mean())
    if case.kind in ("cnn", "images"):
        return _cnn(params)
    for numbers in params["dense"]:
        layers += [_linear(numbers), nn.ELU()]
    return nn.Sequential(*layers[:-1])


class Problem:
    """The same model and batch as in JAX.

    Attributes:
      trunk: The part that all losses share.
      heads: The parts of the single losses, if there are any.
    """

    def __init__(self, case: Case, device: str) -> None:
        params, batch = make_numbers(case)
        self.case = case
        self.trunk = _trunk(case, params, batch).to(device)
        self.heads: list[nn.Module] = []
        if case.kind == "transformer":
            self.heads = [_linear(numbers).to(device) for numbers in params["heads"]]
        elif case.kind in ("features", "heads"):
            self.heads = [_linear(vector[:, None]).to(device) for vector in params["heads"]]
        batch.pop("base", None)
        self.batch = {name: _tensor(array).to(device) for name, array in batch.items()}
        if case.kind in ("cnn", "images"):
            self.batch["inputs"] = self.batch["inputs"].permute(0, 3, 1, 2).contiguous()

    def features(self) -> torch.Tensor:
        return self.trunk(self.batch["inputs"])

    def losses_at(self, features: torch.Tensor) -> list[torch.Tensor]:
        """One loss per head."""
        if self.case.kind in ("features", "heads"):
            return [(head(features) ** 2).mean() for head in self.heads]
        pairs = zip(self.heads, self.batch["targets"], strict=True)
        return [((head(features)[:, 0] - target) ** 2).mean() for head, target in pairs]

    def losses(self) -> torch.Tensor:
        """All losses, ``(m,)``."""
        if self.case.kind == "pinn":
            return torch.stack(self.residuals())
        if self.case.kind == "own":
            pairs = zip(self.batch["inputs"], self.batch["heads"].T, strict=True)
            return torch.stack([((self.trunk(x) @ head) ** 2).mean() for x, head in pairs])
        features = self.features()
        if self.case.kind == "stacked":
            products = (features * self.batch["heads"].T[:, None]).sum(-1)
            return (products**2).mean(1)
        if self.case.kind == "images":
            targets = self.batch["targets"].long()
            return torch.stack([nn.functional.cross_entropy(features, row) for row in targets])
        if self.heads:
            return torch.stack(self.losses_at(features))
        if self.case.per_example:
            targets = self.batch["targets"].long()
            return nn.functional.cross_entropy(features, targets, reduction="none")
        return ((features @ self.batch["heads"]) ** 2).mean(0)

    def residuals(self) -> list[torch.Tensor]:
        """Burgers' equation inside, and the values at the start and at the edge."""

        def slopes(of: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(of.sum(), inside, create_graph=True)[0]

        inside = self.batch["inside"].clone().requires_grad_()
        start, edge = self.batch["start"], self.batch["edge"]
        u = self.trunk(inside)[:, 0]
        u_t, u_x = slopes(u).unbind(1)
        u_xx = slopes(u_x)[:, 1]
        first = self.trunk(start)[:, 0] + torch.sin(torch.pi * start[:, 1])
        inner = u_t + u * u_x - 0.01 / torch.pi * u_xx
        return [(self.trunk(edge) ** 2).mean(), (inner**2).mean(), (first**2).mean()]

    def clear(self) -> None:
        self.trunk.zero_grad()
        for head in self.heads:
            head.zero_grad()


def make_step(problem: Problem, variant: str) -> Callable[[], torch.Tensor]:
    """A function that takes one step: gradients in ``.grad``; it returns the losses."""
    from torchjd.aggregation import UPGrad, UPGradWeighting
    from torchjd.autogram import Engine
    from torchjd.autojac import backward, jac_to_grad, mtl_backward

    aggregator, weighting = UPGrad(), UPGradWeighting()
    params = list(problem.trunk.parameters())
    whole = problem.case.is_shape and not variant.startswith("mtl")
    if whole:
        params += [param for head in problem.heads for param in head.parameters()]
    chunk = 1 if "sequential" in variant else None
    gramian_only = "gramian" in variant or "sequential" in variant

    def plain() -> torch.Tensor:
        losses = problem.losses()
        losses.mean().backward()
        return losses

    def jacobian() -> torch.Tensor:
        if problem.heads and not whole:
            features = problem.features()
            found = problem.losses_at(features)
            mtl_backward(found, features, parallel_chunk_size=chunk)
            losses = torch.stack(found)
        else:
            losses = problem.losses()
            backward(losses, parallel_chunk_size=chunk)
        jac_to_grad(params, aggregator, optimize_gramian_computation=gramian_only)
        return losses

    def by_tensor() -> torch.Tensor:
        losses = problem.losses()
        backward(losses, parallel_chunk_size=chunk)
        for param in params:
            jac_to_grad([param], aggregator)
        return losses

    def features() -> torch.Tensor:
        at_trunk = problem.features()
        cut = at_trunk.detach().requires_grad_()
        at_heads = cut.view_as(cut)  # `mtl_backward` takes features that are no leaf.
        losses = problem.losses_at(at_heads)
        mtl_backward(losses, at_heads, shared_params=[cut], parallel_chunk_size=chunk)
        jac_to_grad([cut], aggregator)
        at_trunk.backward(cut.grad)
        return torch.stack(losses)

    def autogram() -> torch.Tensor:
        losses = problem.losses()
        losses.backward(weighting(engine.compute_gramian(losses)))
        return losses

    if variant == "autogram":
        # Losses that are means over the batch have no batch axis.
        modules = [problem.trunk, *problem.heads] if whole else [problem.trunk]
        engine = Engine(*modules, batch_dim=0 if problem.case.per_example else None)
        run = autogram
    elif variant == "plain":
        run = plain
    else:
        ways = {"autojac": jacobian, "mtl": jacobian, "features": features, "by": by_tensor}
        run = ways[variant.split()[0]]

    def step() -> torch.Tensor:
        problem.clear()
        return run()

    return step


def _status(field: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(values[0]) * 1024 / MEGABYTE if values else None


class Memory:
    """The peak of the resident set, or of a GPU's allocations, since it was made, in MB.

    ``ru_maxrss`` starts at the peak of the process that started this one, so Linux' own figures are
    read where there are any.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / MEGABYTE
            return
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # Gives back what was freed: it is no reserve.
            Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
        self.before = _status("VmRSS") or self.peak()

    def peak(self) -> float:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / MEGABYTE
        unit = 1 if sys.platform == "darwin" else 1024
        fallback = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE
        return _status("VmHWM") or fallback


def norm_of(problem: Problem) -> float:
    """The length of the gradient of the shared parameters."""
    squares = [(param.grad**2).sum().item() for param in problem.trunk.parameters()]
    return sum(squares) ** 0.5


def answers(case: Case, variant: str) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # What libraries allocate when they are first used is not the step's.
    small = next(other for other in CASES.values() if other.kind == case.kind and other.tiny)
    make_step(Problem(small, device), variant)()
    problem = Problem(case, device)
    step = make_step(problem, variant)
    memory = Memory(device)

    def timed_step() -> float:
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    losses = step().detach().tolist()
    yield {"losses": losses, "norm": norm_of(problem)}
    for line in sys.stdin:
        end = time.perf_counter() + float(line)
        timed_step()  # The other framework had the caches.
        times = [timed_step()]
        while time.perf_counter() < end:
            times.append(timed_step())
        peak = memory.peak()
        yield {"times": times, "before_mb": memory.before, "peak_mb": peak}


def main() -> None:
    warnings.filterwarnings("ignore")
    name, variant = sys.argv[1:]
    try:
        for answer in answers(CASES[name], variant):
            print(json.dumps(answer), flush=True)
    except Exception as error:  # Reported in the table: it may be what TorchJD cannot do.
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__":
    main()
