"""Muon: momentum, orthogonalised before it becomes the step; AdamW for all other parameters.

python train.py --optimiser muon --lr 4e-3

Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). The step is scaled as in
arXiv 2502.16982, so that learning rates are about AdamW's.
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from the Muon article


def orthogonalise(matrices, steps=5):
    """About U V^T of every float matrix (m, n) = U S V^T in a list: a Newton-Schulz iteration brings S near 1.

    Each step multiplies the matrix from the left by a polynomial of its Gram matrix. The polynomials are accumulated
    on the short side, so that the long side is read only twice, and Gram matrices of one size are batched.
    """
    short = [m.T if m.shape[0] > m.shape[1] else m for m in matrices]
    short = torch._foreach_div(short, [norm + 1e-7 for norm in torch._foreach_norm(short)])
    results = [None] * len(short)
    for side in sorted({len(x) for x in short}):
        places = [i for i, x in enumerate(short) if len(x) == side]
        products = _polynomials(torch.stack([short[i] @ short[i].T for i in places]), steps)
        for i, product in zip(places, products, strict=True):
            results[i] = product @ short[i]
    return [x if x.shape == m.shape else x.T for x, m in zip(results, matrices, strict=True)]


def _polynomials(grams, steps):
    """The product (N, m, m) of `steps` iterations for matrices with these Gram matrices (N, m, m)."""
    a, b, c = COEFFICIENTS
    product = None
    for _ in range(steps):
        step = torch.baddbmm(grams, grams, grams, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        product = step if product is None else step @ product
        grams = step @ grams @ step
    return product


def _matrix(x):
    """Weights as a matrix with one row per output; a view if x is channels-last, since columns may be in any order."""
    return x if x.dim() == 2 else x.movedim(1, -1).flatten(1)


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
            if group["orthogonal"]:
                self._orthogonal_step(group, [p for p in group["params"] if p.grad is not None])
        super().step()

    def _orthogonal_step(self, group, parameters):
        if not parameters:
            return
        for p in parameters:
            if "momentum" not in self.state[p]:
                # AdamW expects a step in every parameter's state when one is loaded.
                self.state[p] |= {"momentum": torch.zeros_like(p), "step": torch.tensor(0.0)}
        gradients, momenta = [p.grad for p in parameters], [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
        steps = orthogonalise([_matrix(x) for x in nesterov])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for p, step in zip(parameters, steps, strict=True):
            step = step if p.dim() == 2 else step.unflatten(1, (*p.shape[2:], -1)).movedim(-1, 1)
            p.add_(step, alpha=-group["lr"] * 0.2 * max(step.shape[0], step[0].numel()) ** 0.5)
            p.grad = None  # AdamW skips parameters without a gradient
