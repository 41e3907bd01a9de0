"""What mmengine's runners do beside plain training, with BNET in the model: averaged weights, exact statistics, early
stopping, profiling, compilation, strategies."""

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import HOOKS

import helpers.toy_host as toy_host
from bnet_mm import BNET
from bnet_mm.engine.runner import build_runner
from helpers import reference
from helpers.hosts import import_host_models

EPOCHS = "train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=3)\n"
