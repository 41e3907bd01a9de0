"""What the import of the package does."""

import subprocess
import sys


def test_import_is_lean():
    """No Triton, compiler, host library or plotting is needed or imported, and no process-wide switch is thrown."""
    code = (
        'import sys\n'
        "for name in ('triton', 'mmcv', 'mmdet', 'mmseg', 'mmaction', 'mmpretrain', 'matplotlib'):\n"
        '    sys.modules[name] = None\n'
        'import torch; before = (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),'
        ' torch.backends.cudnn.benchmark, torch.is_grad_enabled(), torch.get_default_dtype())\n'
        'import bnet_mm\n'
        'after = (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),'
        ' torch.backends.cudnn.benchmark, torch.is_grad_enabled(), torch.get_default_dtype())\n'
        'assert before == after\n'
        'print(bnet_mm.BNET(3, k=5)(torch.randn(2, 3, 4, 4)).shape)\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'torch.Size([2, 3, 4, 4])' in done.stdout


def test_import_asks_for_no_private_name_that_older_torch_lacks():
    """torch 2.6 has no _has_any_global_hook."""
    code = "from torch.nn.modules import module\nvars(module).pop('_has_any_global_hook', None)\nimport bnet_mm\n"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
