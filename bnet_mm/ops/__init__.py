"""The kernels. Start at bnet.py, the public operation; reference.py is the same in plain torch."""

from bnet_mm.ops.bnet import bnet
from bnet_mm.ops.dispatch import backend_report, describe_backend, select_backend
from bnet_mm.ops.reference import bnet_reference

__all__ = ['backend_report', 'bnet', 'bnet_reference', 'describe_backend', 'select_backend']
