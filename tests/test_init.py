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
