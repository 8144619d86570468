"""Muon: momentum, orthogonalised before it becomes the step; AdamW for all other parameters.

python train.py --optimiser muon --lr 4e-3

Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). The step is scaled as in
arXiv 2502.16982, so that learning rates are about AdamW's.
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from the Muon article


def orthogonalise(matrices, steps=5):
    """About U V^T of every float matrix (m, n) = U S V^T in a list: a Newton-Schulz iteration brings S near 1.

    Each step multiplies the matrix by a polynomial of its Gram matrix. The polynomials are accumulated on the short
    side, so that the long side is read only twice. Matrices of one shape are stacked, Gram matrices of one side too.
    """
    places, sides = {}, {}
    for i, matrix in enumerate(matrices):
        places.setdefault(tuple(matrix.shape), []).append(i)
    stacks = {shape: torch.stack([matrices[i] for i in where]) for shape, where in places.items()}  # (N, m, n)
    for shape in stacks:
        sides.setdefault(min(shape), []).append(shape)
    results = [None] * len(matrices)
    for shapes in sides.values():
        grams = [x @ x.mT if m <= n else x.mT @ x for (m, n), x in ((shape, stacks[shape]) for shape in shapes)]
        products = _polynomials(torch.cat(grams), steps).split([len(stacks[shape]) for shape in shapes])
        for (m, n), product in zip(shapes, products, strict=True):
            x = stacks[m, n]
            for i, result in zip(places[m, n], product @ x if m <= n else x @ product, strict=True):
                results[i] = result
    return results


def _polynomials(grams, steps):
    """The product (N, m, m) of `steps` iterations for matrices with these Gram matrices (N, m, m), over their norms."""
    a, b, c = COEFFICIENTS
    squares = grams.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + 1e-14  # of the matrices' Frobenius norms
    grams, product = grams / squares, squares.rsqrt()
    for i in range(steps):
        step = torch.baddbmm(grams, grams, grams, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        product = step * product if i == 0 else step @ product
        if i + 1 < steps:
            grams = step @ grams @ step
    return product


class Muon(torch.optim.AdamW):
    """AdamW, except that groups with `orthogonal` set take Muon's steps; these contain matrices or convolutions."""

    def __init__(self, groups, lr, momentum=0.95, **settings):
        super().__init__(groups, lr=lr, **settings)
        self._step_supports_amp_scaling = False  # let the gradient scaler skip a step that overflows
        for group in self.param_groups:
            group.setdefault("orthogonal", False)
            group["momentum"] = momentum

    @torch.no_grad()
    def step(self):
        """One step of all groups."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["orthogonal"] and parameters:
                self._orthogonal_step(group, parameters)
        super().step()

    def _orthogonal_step(self, group, parameters):
        for p in parameters:
            if "momentum" not in self.state[p]:
                # AdamW expects a step in every parameter's state when one is loaded.
                self.state[p] |= {"momentum": torch.zeros_like(p), "step": torch.tensor(0.0)}
        gradients, momenta = [p.grad for p in parameters], [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
        # One row per output; a view if x is channels-last, since columns may be in any order.
        steps = orthogonalise([x if x.dim() == 2 else x.movedim(1, -1).flatten(1) for x in nesterov])
        scales = [-group["lr"] * 0.2 * max(step.shape) ** 0.5 for step in steps]
        steps = [
            step if p.dim() == 2 else step.unflatten(1, (*p.shape[2:], -1)).movedim(-1, 1)
            for p, step in zip(parameters, steps, strict=True)
        ]
        torch._foreach_mul_(steps, scales)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, steps)
        for p in parameters:
            p.grad = None  # AdamW skips parameters without a gradient
