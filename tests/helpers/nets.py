"""Small networks to operate on."""

from mmengine.registry import MODELS, DefaultScope
from torch import nn

from bnet_mm import BNET
from helpers import reference
from helpers.hosts import import_host_models


class Bottleneck(nn.Module):
    """As torchvision and timm write it."""

    def __init__(self, c=4, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 1, bias=False), norm(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), norm(c)
        self.conv3, self.bn3 = nn.Conv2d(c, c, 1, bias=False), norm(c)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (x + self.bn3(self.conv3(y))).relu()


def small_net(norm=nn.BatchNorm2d):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), Bottleneck(norm=norm), Bottleneck(norm=norm))
    return reference.randomise(net)


def bnet_names(model):
    return {name for name, m in model.named_modules() if isinstance(m, BNET)}


def build(scope, cfg):
    import_host_models(scope)
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(cfg)


def backbone(kind='ResNet', bnet=None, **options):
    options = {'depth': 50, **options}
    if bnet is None:
        return MODELS.build(dict(type=kind, **options))
    return MODELS.build(dict(type='WithBNET', base=kind, bnet=bnet, **options))


BLOCKS_50 = [f'layer{i}.{j}' for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n)]
