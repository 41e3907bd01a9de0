"""What an experiment compares: a YAML file of variants of one config, and the claims that they test."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config

from bnet_mm.cli import UserError, clear_errors
from bnet_mm.surgery.config import dicts_in

FIELDS = ('about', 'base', 'metric', 'seeds', 'variants', 'claims')
VARIANT_FIELDS = ('base', 'options', 'than', 'weights', 'processes')
CLAIM_FIELDS = ('source', 'says', 'printed', 'variant', 'than')
OF = ('last', 'mean')


@dataclass(frozen=True)
class Variant:
    """One way to train.

    base: The config.
    options: Merged into it, as ``--cfg-options`` of tools/train.py.
    than: The variant that it is compared with, whose initial weights it starts from; None: it starts from its own.
    weights: 'PLAN/VARIANT': it starts from what the run of that variant with the same seed has learnt, instead.
    processes: Trained by tools/dist_train.sh if more than one.
    """

    name: str
    base: Path
    options: dict[str, Any] = field(default_factory=dict)
    than: str | None = None
    weights: str | None = None
    processes: int = 1


@dataclass(frozen=True)
class Claim:
    """A printed difference of two variants, in the unit of the metric.

    source: Where it is printed.
    says: What it says, in a few words.
    printed: The difference; 1 or -1 where only its direction is said.
    of: The metric after the 'last' epoch, or its 'mean' over all epochs, which a faster convergence raises.
    """

    source: str
    says: str
    printed: float
    variant: str
    than: str
    of: str = 'last'


@dataclass(frozen=True)
class Plan:
    """All runs of an experiment: every variant with every seed from 0 on.

    results: The folder with a CSV file of what came out, for each plan.
    """

    path: Path
    results: Path
    about: str
    metric: str
    seeds: int
    variants: dict[str, Variant]
    claims: tuple[Claim, ...]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def csv(self) -> Path:
        return self.results / f'{self.name}.csv'

    def runs(self) -> Iterator[tuple[Variant, int]]:
        """All variants of seed 0, then of seed 1, so that what is done is a comparison at any time."""
        for seed in range(self.seeds):
            for variant in self.variants.values():
                yield variant, seed

    def config(self, variant: Variant, seed: int) -> Config:
        """The whole config of a run, which tools/train.py takes as it is."""
        cfg = self._merged(variant)
        start = None
        if variant.than and not variant.weights:
            start = self._merged(self.variants[variant.than]).model.to_dict()
        hooks = [*cfg.get('custom_hooks', []), dict(type='PairedRun', seed=seed, start=start)]
        cfg.custom_hooks = hooks
        cfg.randomness = dict(seed=seed)
        return cfg

    def digest(self, variant: Variant) -> str:
        """Twelve digits that change with anything that a variant says but its seed and the folder of the data."""
        cfg = self.config(variant, 0).to_dict()
        if variant.weights:
            cfg['load_from'] = variant.weights
        if variant.processes > 1:
            cfg['processes'] = variant.processes
        roots = sorted(filter(None, {node.pop('data_root', None) for _, node in dicts_in(cfg)}))
        for _, node in dicts_in(cfg):
            for name, value in node.items():
                for root in roots if isinstance(value, str) else ():
                    node[name] = value.removeprefix(f'{root.rstrip("/")}/')  # an evaluator's ann_file, for one
        text = json.dumps(cfg, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _merged(self, variant: Variant) -> Config:
        with clear_errors(f'{self.path}, {variant.name}: {variant.base} with these options is no config'):
            cfg = Config.fromfile(variant.base)
            cfg.merge_from_dict(copy.deepcopy(variant.options))
        return cfg


def read_plan(path: Path, results: Path | None = None) -> Plan:
    """Read a plan.

    Args:
        results: The folder of what came out; None: that of the plan.

    Raises:
        UserError: For a file that is none, a field that is missing or unknown, a variant that nothing has, with what is
            allowed.
    """
    with clear_errors(f'plan {path} cannot be read'):
        given = yaml.safe_load(path.read_text())
    where = f'plan {path}'
    _check_fields(given, FIELDS, FIELDS, where)
    _check(
        isinstance(given['seeds'], int) and given['seeds'] > 0, f'{where}: seeds is a number above 0', given['seeds']
    )
    _check(isinstance(given['variants'], dict), f'{where}: variants is a mapping of names', given['variants'])
    variants = {}
    for name, one in given['variants'].items():
        name, one = str(name), one or {}
        at = f'{where}, variant {name}'
        _check_fields(one, VARIANT_FIELDS, (), at)
        than, processes = one.get('than'), one.get('processes', 1)
        _check(than is None or than in variants, f'{at}: than names a variant above it', than)
        _check(isinstance(processes, int) and processes > 0, f'{at}: processes is a number above 0', processes)
        base = path.parent / one.get('base', given['base'])
        _check(base.is_file(), f'{at}: base is a config beside the plan', str(base))
        weights = one.get('weights')
        _check(weights is None or str(weights).count('/') == 1, f'{at}: weights is PLAN/VARIANT', weights)
        options = one.get('options') or {}
        _check(isinstance(options, dict), f'{at}: options is a mapping of places in the config', options)
        variants[name] = Variant(name, base, options, than, weights, processes)
    _check(isinstance(given['claims'], list), f'{where}: claims is a list', given['claims'])
    claims = []
    for one in given['claims']:
        _check_fields(one, (*CLAIM_FIELDS, 'of'), CLAIM_FIELDS, f'{where}, claims')
        _check(one.get('of', 'last') in OF, f'{where}, claims: of is one of {", ".join(OF)}', one.get('of'))
        _check(isinstance(one['printed'], (int, float)), f'{where}, claims: printed is a number', one['printed'])
        for side in ('variant', 'than'):
            _check(one[side] in variants, f'{where}, claims: {side} is one of {", ".join(variants)}', one[side])
        claims.append(Claim(**one))
    return Plan(path, results or path.parent, given['about'], given['metric'], given['seeds'], variants, tuple(claims))


def _check(holds: bool, rule: str, got: Any) -> None:
    if not holds:
        raise UserError(f'{rule}, got {got!r}')


def _check_fields(given: Any, known: tuple[str, ...], needed: tuple[str, ...], where: str) -> None:
    _check(isinstance(given, dict), f'{where} is a mapping of {", ".join(known)}', given)
    for name in given:
        close = difflib.get_close_matches(str(name), known, n=1)
        meant = f'did you mean {close[0]}?' if close else f'there are {", ".join(known)}'
        if name not in known:
            raise UserError(f'{where} has no field {name}; {meant}')
    if missing := [name for name in needed if name not in given]:
        raise UserError(f'{where} lacks {", ".join(missing)}')
