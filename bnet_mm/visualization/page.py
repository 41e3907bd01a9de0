"""One static page about one or several runs: index.html with pictures beside it, from a Jinja2 template."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import Environment, FileSystemLoader
from mmengine.config import Config

from bnet_mm.files import written
from bnet_mm.surgery.config import dicts_in, type_name
from bnet_mm.visualization.figures import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
DPI = 100


class Picture(NamedTuple):
    """A file beside the page; ``alt`` is its caption and what is read to those who do not see it."""

    file: str
    alt: str
    width: int
    height: int


class Table(NamedTuple):
    """Cells are text; a column is sorted by the numbers that its cells begin with."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """A part of the page; ``files`` beside it are linked."""

    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def add(self, figure: Figure, out: Path, file: str, alt: str) -> None:
        """Save a figure into ``out`` and show it."""
        save(figure, out / file, DPI)
        width, height = (round(size * DPI) for size in figure.get_size_inches())
        self.pictures.append(Picture(file, alt, width, height))


def norm_of(cfg: Config) -> str:
    """BNET's k and place in a config; the type of another norm."""
    nodes = [node for _, node in dicts_in(cfg.to_dict()['model'])]
    for node in nodes:
        if type_name(node) == 'WithBNET':
            options = node.get('bnet') or {}
            return f'BNET-{options.get("k", 3)} at {options.get("where", "C")}'
    norms = [node['norm_cfg'] for node in nodes if isinstance(node.get('norm_cfg'), dict)]
    bnet = next((norm for norm in norms if type_name(norm) == 'BNET'), None)
    return f'BNET-{bnet.get("k", 3)} by norm_cfg' if bnet else type_name(norms[0]) if norms else 'BN'


def compared(values: list[float], reference: list[float]) -> str:
    """A mean with deviation and n, its difference to a reference, and an arrow if that is more than chance.

    The arrow stands where the difference is larger than twice its standard error, which takes two seeds of both.
    """
    mean, base = statistics.fmean(values), statistics.fmean(reference)
    spread = f' ± {statistics.stdev(values):.4g} (n = {len(values)})' if len(values) > 1 else ''
    if values is reference:
        return f'{mean:.4g}{spread}'
    arrow = ''
    if len(values) > 1 and len(reference) > 1:
        error = sum(statistics.variance(one) / len(one) for one in (values, reference)) ** 0.5
        if abs(mean - base) > 2 * error:
            arrow = ' ▲' if mean > base else ' ▼'
    return f'{mean:.4g}{spread}, {mean - base:+.4g}{arrow}'


def revision() -> str:
    """The git revision of the checkout that this file stands in; empty for an installed package."""
    command = ['git', '-C', str(HERE), 'describe', '--always', '--dirty']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ''


def write_page(title: str, sections: list[Section], footer: str, out: Path) -> Path:
    """Write ``out/index.html``; all text is escaped."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template('page.html').render(title=title, sections=sections, footer=footer)
    target = out / 'index.html'
    with written(target) as temporary:
        temporary.write_text(page, encoding='utf-8')
    return target
