"""Small Frank-Wolfe problems with a loss and a gradient in closed form."""

import numpy as np
import torch

SHAPES = {"encoder.weight": (7, 5), "encoder.bias": (7,), "head.weight": (3, 7)}


def toy(seed=0, count=4, shift=0.0):
    """Base, candidates, and the target and curvature of ℓ = ½ Σ a (θ − c)²."""
    rng = np.random.default_rng(seed)
    base = {n: rng.normal(size=s) for n, s in SHAPES.items()}
    candidates = [{n: base[n] + rng.normal(size=s) + shift for n, s in SHAPES.items()} for _ in range(count)]
    target = {n: rng.normal(size=s) for n, s in SHAPES.items()}
    curvature = {n: rng.uniform(0.5, 2.0, size=s) for n, s in SHAPES.items()}
    return base, candidates, target, curvature


def torched(state, dtype=torch.float32):
    return {n: torch.tensor(x, dtype=dtype) for n, x in state.items()}


class Quadratic:
    def __init__(self, target, curvature):
        self.c, self.a = torched(target, torch.float64), torched(curvature, torch.float64)
        self.value = None

    def loss(self, state):
        return float(sum((self.a[n] * (state[n].double() - self.c[n]) ** 2).sum() for n in self.c)) / 2

    def __call__(self, state):
        self.value = self.loss(state)
        return {n: (self.a[n] * (state[n].double() - self.c[n])).float() for n in self.c}
