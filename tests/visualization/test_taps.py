"""Statistics of taps against loops over numbers, and on kernels whose answers are known."""

import pytest
import torch
from torch import nn

from bnet_mm.layers import BNET
from bnet_mm.visualization.taps import draw_taps, energy_off_centre, stage_shares, tap_layers, tap_statistics


def by_loops(taps):
    total = off = even = 0.0
    k = taps.shape[1]
    for kernel in taps.double().tolist():
        for i in range(k):
            for j in range(k):
                total += kernel[i][j] ** 2
                if (i, j) != (k // 2, k // 2):
                    off += kernel[i][j] ** 2
                    even += ((kernel[i][j] + kernel[k - 1 - i][k - 1 - j]) / 2) ** 2
    return off / total, even / off


@pytest.mark.parametrize('channels, k', [(1, 3), (5, 5), (3, 7)])
def test_shares_are_those_of_loops(channels, k):
    taps = torch.randn(channels, k, k)
    found, (off, even) = tap_statistics(taps), by_loops(taps)
    assert found['off centre'] == pytest.approx(off, rel=1e-5)
    assert found['symmetric'] == pytest.approx(even, rel=1e-5)
    assert found['symmetric'] + found['antisymmetric'] == pytest.approx(1)
    assert found['mean tap'] == pytest.approx(float(taps.mean()), rel=1e-5)
    assert energy_off_centre(taps).tolist() == pytest.approx([by_loops(one[None])[0] for one in taps], rel=1e-5)


def test_known_kernels():
    bn, sobel, box = torch.zeros(3, 3), torch.tensor([[-1.0, 0, 1]] * 3), torch.ones(3, 3)
    bn[1, 1] = 2
    assert tap_statistics(bn[None]) == {
        'off centre': 0, 'symmetric': 0, 'antisymmetric': 0, 'mean tap': pytest.approx(2 / 9), 'changed': 0
    }  # fmt: skip
    assert tap_statistics(sobel[None])['antisymmetric'] == 1
    assert tap_statistics(torch.stack([box, box, bn])) == {
        'off centre': pytest.approx(16 / 22), 'symmetric': 1, 'antisymmetric': 0,
        'mean tap': pytest.approx(20 / 27), 'changed': 2,
    }  # fmt: skip
    assert tap_statistics(torch.zeros(2, 3, 3))['off centre'] == 0


def test_layers_and_stages_of_a_model():
    model = nn.Module()
    model.layer1 = nn.Sequential(BNET(2, 3), BNET(2, 1), nn.BatchNorm2d(2))
    model.layer2 = nn.Sequential(BNET(2, 5), BNET(2, 3))
    with torch.no_grad():
        model.layer2[0].bnconv.weight[0, 0, 0, 0] = 1
    layers = tap_layers(model.state_dict())
    assert {name: taps.shape for name, taps in layers.items()} == {
        'layer1.0': (2, 3, 3), 'layer2.0': (2, 5, 5), 'layer2.1': (2, 3, 3)
    }  # fmt: skip
    assert stage_shares(layers) == {'layer1': 0, 'layer2': pytest.approx(1 / 5)}


def test_released_names():
    """Both forms of the official detectors."""
    taps = torch.randn(4, 1, 3, 3)
    old, new = 'backbone.layer1.0.bnconv3.weight', 'backbone.layer1.0.bnet3.bnconv.weight'
    layers = tap_layers({old: taps, new: taps, 'backbone.layer1.0.bn3.running_mean': torch.zeros(4)})
    assert list(layers) == ['backbone.layer1.0', 'backbone.layer1.0.bnet3']
    assert list(stage_shares(layers)) == ['backbone.layer1']


def test_picture_shows_the_most_changed_channels():
    taps = torch.zeros(20, 3, 3)
    taps[:, 1, 1] = 1
    taps[7, 0, 0], taps[3, 0, 0] = 3, 2
    row = draw_taps({'a': taps}).axes
    assert [axis.get_title() for axis in row[:2]] == ['#7\n90%', '#3\n80%']
    assert (row[0].images[0].get_array() == taps[7].numpy()).all()
