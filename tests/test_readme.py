"""The expression in the README is the layer. What else the documents say: test_documents.py."""

import re

import pytest
import torch
import torch.nn.functional as F

from bnet_mm import BNET
from helpers import reference
from helpers.paths import REPO

README = (REPO / 'README.md').read_text()


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('k, dilation', [(1, 1), (3, 1), (5, 1), (7, 2)])
def test_the_layer_equals_the_expression(k, dilation, training):
    """Runs the README's own lines."""
    (lines,) = (code for code in re.findall(r'```python\n(.*?)```', README, re.S) if 'x_hat' in code)
    layer = reference.randomise(BNET(3, k=k, dilation=dilation)).double().train(training)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64) * 2 + 1
    names = dict(
        F=F, x=x, k=k, dilation=dilation, training=training, num_features=3, weight=layer.bnconv.weight,
        bias=layer.bnconv.bias, running_mean=layer.norm.running_mean.clone(),
        running_var=layer.norm.running_var.clone(),
    )  # fmt: skip
    exec(lines, names)
    torch.testing.assert_close(layer(x), names['y'], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.norm.running_var, names['running_var'])
