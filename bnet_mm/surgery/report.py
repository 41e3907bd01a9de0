"""What became of the layers of a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


@dataclass
class Report:
    """The result of a change of a model; prints as a readable list.

    Attributes:
        model: The changed model.
        changed: Name of each changed layer -> what was done, such as 'BatchNorm2d(64) -> BNET-3'.
        kept: Name of each layer of the kind in question that stays as it was -> why.
    """

    model: nn.Module
    changed: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: how many layers were changed, and to what."""
        results = sorted({done.partition(' -> ')[2] or done for done in self.changed.values()})
        total = len(self.changed) + len(self.kept)
        return f'{type(self.model).__name__}: {len(self.changed)} of {total} norms changed ({", ".join(results)})'

    def __str__(self) -> str:
        lines = [self.summary(), *(f'  {name}: {done}' for name, done in self.changed.items())]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            lines += [f'not changed ({len(names)}), {reason}:', f'  {", ".join(names)}']
        return '\n'.join(lines)
