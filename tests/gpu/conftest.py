import pytest
import torch

from helpers.gpu import gpu_or_stand_in


@pytest.fixture(autouse=True)
def gpu():
    torch.manual_seed(0)
    with gpu_or_stand_in() as machine:
        yield machine
