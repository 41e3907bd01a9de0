"""Whether the owner of an ``nn.Sequential`` takes it apart, as far as its source tells."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
ITERATORS = ('enumerate', 'zip', 'reversed', 'list', 'tuple', 'iter')
VIEWS = ('children', 'named_children', 'values', 'items', '_modules')


def sequentials_in_parts(model: nn.Module) -> Iterator[tuple[nn.Sequential, str]]:
    """Every ``nn.Sequential`` in ``model`` that its owner indexes or loops over, with a title for the owner.

    Its forward may then never run: ``self.stem[0](x)``. An owner whose source cannot be read is taken to do so.
    """
    owners: dict[nn.Module, tuple[nn.Module, str, int]] = {}  # owner that is no container, attribute, depth below it
    for module in model.modules():  # parents come before their children
        for name, child in module.named_children():
            if isinstance(module, CONTAINERS) and module in owners:
                owner, attribute, depth = owners[module]
                owners.setdefault(child, (owner, attribute, depth + 1))
            elif not isinstance(module, CONTAINERS):
                owners.setdefault(child, (module, name, 0))
    for module, (owner, attribute, depth) in owners.items():
        if type(module) is nn.Sequential and _takes_apart(type(owner), attribute, depth):
            yield module, type(owner).__name__


def _takes_apart(kind: type[nn.Module], attribute: str, depth: int) -> bool:
    """Whether a class indexes or loops over what it finds ``depth`` levels below ``self.<attribute>``."""
    for base in kind.__mro__:
        if base is object or base.__module__.partition('.')[0] == 'torch':
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            return True
        methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name != '__init__']
        if any(_method_takes_apart(method, attribute, depth) for method in methods):
            return True
    return False


def _method_takes_apart(method: ast.FunctionDef, attribute: str, depth: int) -> bool:
    names: dict[str, int] = {}  # variables -> levels left above the module in question

    def level(node: ast.AST) -> int | None:
        """How many levels above the module in question this expression is; None if it has nothing to do with it."""
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Subscript):
            above = level(node.value)
            return None if above is None else above - 1
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == 'self':
                return depth if node.attr == attribute else None
            return level(node.value) if node.attr in VIEWS else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'getattr':
            name = node.args[1] if len(node.args) > 1 else None
            return depth if not isinstance(name, ast.Constant) or name.value == attribute else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ITERATORS:
            return min((found for found in map(level, node.args) if found is not None), default=None)
        return level(node.func) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None

    for node in ast.walk(method):  # outer statements come before what is inside them
        if isinstance(node, ast.Assign):
            targets, found = node.targets, level(node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            targets, found = [node.target], level(node.iter)
            found = None if found is None else found - 1
        else:
            targets, found = [], level(node) if isinstance(node, ast.Subscript) else None
        if found is not None and found < 0:
            return True
        if found is not None:
            names.update((part.id, found) for target in targets for part in ast.walk(target) if hasattr(part, 'id'))
    return False
