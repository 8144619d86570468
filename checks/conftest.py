"""Every test starts from the same random state, so that a failure can be repeated."""

import common  # noqa: F401 - before torch

import torch


def pytest_runtest_setup():
    torch.manual_seed(0)
