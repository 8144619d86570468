"""Muon: momentum whose matrix is orthogonalised before it becomes the step; AdamW for all that is no matrix.

python train.py --optimiser muon --lr 4e-3

Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the step's size as in
arXiv 2502.16982, so that learning rates are about AdamW's.
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from the Muon article


def orthogonalise(matrix, steps=5):
    """About U V^T of a float matrix (m, n) = U S V^T: singular values brought near 1 by a Newton-Schulz iteration.

    Each step multiplies the matrix from the left by a polynomial of its Gram matrix; the polynomials are gathered on
    the short side first, so that the long side is passed over twice only.
    """
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    gram, identity = x @ x.T, torch.eye(len(x), device=x.device)
    product = identity
    for _ in range(steps):
        step = torch.addmm(a * identity + b * gram, gram, gram, alpha=c)
        product, gram = step @ product, step @ gram @ step
    x = product @ x
    return x if x.shape == matrix.shape else x.T


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `orthogonal` set take Muon's steps; their parameters are matrices or convolutions."""

    def __init__(self, groups, lr, momentum=0.95, **settings):
        self.matrices = []
        super().__init__(groups, lr=lr, **settings)
        for group in self.param_groups:
            group.setdefault("orthogonal", False)
            group["momentum"] = momentum

    @torch.no_grad()
    def step(self, closure=None):
        """One step of all groups."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            if group["orthogonal"]:
                for p in group["params"]:
                    if p.grad is not None:
                        self._orthogonal_step(p, group)
                        p.grad = None  # AdamW passes over parameters without a gradient
        super().step()
        return loss

    def _orthogonal_step(self, p, group):
        state = self.state[p]
        if "momentum" not in state:
            # AdamW looks for a step wherever a parameter has a state, when one is loaded.
            state["momentum"], state["step"] = torch.zeros_like(p), torch.tensor(0.0)
        state["momentum"].lerp_(p.grad, 1 - group["momentum"])
        towards = p.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's
        step = orthogonalise(towards.flatten(1))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(step.view_as(p), alpha=-group["lr"] * 0.2 * max(step.shape) ** 0.5)
