"""What --help says: each option has a sentence, which names the default."""

import argparse
import sys
from pathlib import Path

import pytest

from helpers.paths import REPO
from helpers.tools import load_tool
from tools.test_environment import TOOLS


@pytest.mark.parametrize('tool', TOOLS)
def test_every_option_is_explained(tool, monkeypatch):
    parsers = []
    monkeypatch.syspath_prepend(str(REPO / 'tools' / 'dev'))
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', lambda self: sys.exit(parsers.append(self)))
    with pytest.raises(SystemExit):
        load_tool(tool.removesuffix('.py')).main()
    (parser,) = parsers
    for action in parser._actions:
        what = action.option_strings or action.dest
        assert action.help, f'{tool} {what} has no help'
        default = action.default
        said = isinstance(default, (int, float, str, Path)) and not isinstance(default, bool)
        if said and default != argparse.SUPPRESS:
            shown = (argparse.SUPPRESS, str(default), '%(default)s')
            assert any(word in action.help for word in shown), f'{tool} {what} does not name {default}'
