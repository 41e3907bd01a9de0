"""What became of the layers of a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


@dataclass
class Report:
    """The result of a change of a model; prints as a readable list.

    Attributes:
        verb: What was done, such as 'enhanced'.
        model: The changed model.
        changed: Name of each changed layer -> what was done, such as 'BatchNorm2d(64) -> BNET-3'.
        kept: Name of each layer of the kind in question that stays as it was -> why.
        tails: Name of each residual block whose last norm is BNET -> why its tail does not run in one pass (tails.py);
            empty if it does. Only of ``enhance``.
    """

    verb: str
    model: nn.Module
    changed: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    tails: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: how many layers were changed."""
        total = len(self.changed) + len(self.kept)
        return f'{self.verb} {len(self.changed)} of {total} norms of {type(self.model).__name__}'

    def __str__(self) -> str:
        lines = [self.summary(), *(f'  {name}: {done}' for name, done in self.changed.items())]
        for reason, names in _by_reason(self.kept).items():
            lines += [f'not {self.verb} ({len(names)}), {reason}:', f'  {", ".join(names)}']
        for reason, names in _by_reason(self.tails).items():
            how = f'one after the other ({len(names)}), {reason}' if reason else f'in one pass ({len(names)})'
            lines += [f'norm, sum and ReLU of residual blocks {how}:', f'  {", ".join(names)}']
        return '\n'.join(lines)


def _by_reason(reasons: dict[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return names
