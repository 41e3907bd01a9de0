import logging

import pytest


@pytest.fixture(autouse=True)
def quiet():
    """mmengine logs every weight that it initialises, which takes longer than to load it."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
