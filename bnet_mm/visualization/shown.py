"""A trained model whose maps are drawn over images (tools/heatmap.py, tools/report.py)."""

from __future__ import annotations

from mmengine.config import Config
from torch.utils.flop_counter import FlopCounterMode

from bnet_mm.cli import UserError, clear_errors
from bnet_mm.layers import BNET
from bnet_mm.visualization.inference import drawn, infer, trained
from bnet_mm.visualization.maps import default_layers, recorded_maps
from bnet_mm.visualization.strips import Row, heat_picture

FRAMES = 4  # shown of a video
CAPTION = (
    'Enhancement: number of channels whose output lies above the regression line over in- and output of the taps. '
    'Attention: mean over channels of the squared activations. Red is the largest value of each map.'
)


class Shown:
    """A model with the layers whose maps are drawn.

    Args:
        name: Stands beside its rows.
        cfg: Its config; the model in it is changed to see images as a whole, not in windows.
        checkpoint: Must hold every tensor of the model.
        layers: Names of modules; of none, the last BNET of each stage and the stages.

    Raises:
        UserError: For a model without stages of residual blocks where no layers are named, and for unknown layers.
    """

    def __init__(self, name: str, cfg: Config, checkpoint: str, layers: list[str]) -> None:
        if cfg.model.get('test_cfg') and cfg.model.test_cfg.get('mode') == 'slide':
            cfg.model.test_cfg.mode = 'whole'  # the maps of a window are not those of the picture
        self.name, self.cfg = name, cfg
        self.model, self.meta = trained(cfg, checkpoint)
        enhanced, stages = default_layers(self.model)
        self.layers = layers or [*enhanced, *stages]
        if not self.layers:
            raise UserError(f'{name}: no stages of residual blocks in this model; name layers with --layers')
        known = dict(self.model.named_modules())
        if unknown := [layer for layer in self.layers if layer not in known]:
            raise UserError(f'{name}: the model has no {", ".join(unknown)}')
        self.enhanced = [layer for layer in self.layers if isinstance(known[layer], BNET)]

    def rows(self, path: str) -> list[Row]:
        """Enhancement and attention over an image, or over some frames of a video.

        Raises:
            UserError: If the file cannot be read, or the model cannot be run on it.
        """
        with clear_errors(f'{path} cannot be shown'), recorded_maps(self.model, self.layers) as maps:
            seen = infer(self.model, self.cfg, path)
            predicted = ('predictions', drawn(self.cfg, seen, self.meta))
        others = [name for name in self.layers if name not in self.enhanced]
        every = max(1, len(seen.pictures) // FRAMES)
        rows = []
        for frame in range(0, len(seen.pictures), every)[:FRAMES]:
            picture = seen.pictures[frame]
            for kind, names in (('enhancement', self.enhanced), ('attention', others)):
                cells = [(name, heat_picture(maps[name][frame], picture, seen.share)) for name in names]
                if cells:
                    input_cell = (f'frame {frame}', picture) if len(seen.pictures) > 1 else predicted
                    rows.append(Row(f'{self.name}, {kind}', [input_cell, *cells]))
        return rows

    def cost(self, path: str) -> tuple[float, float]:
        """Trained parameters in millions, and multiply-adds in 10^9 (torch's count) of the model on a file."""
        with FlopCounterMode(display=False) as counter:
            infer(self.model, self.cfg, path)
        parameters = sum(value.numel() for value in self.model.parameters() if value.requires_grad)
        return parameters / 1e6, counter.get_total_flops() / 2e9
