"""Importing the models of the four host libraries."""

import importlib

import pytest


def import_host_models(scope):
    """Import <scope>.models, with known defects of installed libraries mended; skip the test if it is not there."""
    if scope == 'mmengine':
        return
    pytest.importorskip(scope)
    importlib.import_module('bnet_mm.host.compat')
    try:
        importlib.import_module(f'{scope}.models')
    except ImportError as error:
        pytest.skip(f'{scope}: {error}')
