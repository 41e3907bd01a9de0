"""Package metadata. The OpenMMLab frameworks are extras: the maintained forks have other names, same imports."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'bnet_mm' / '__init__.py').read_text())[1]
FRAMEWORK = ['mmengine>=0.10.0', 'mmcv>=2.0.0']
EXTRAS = {
    'det': [*FRAMEWORK, 'mmdet>=3.0.0'],
    'seg': [*FRAMEWORK, 'mmsegmentation>=1.0.0', 'ftfy', 'regex'],
    'action': [*FRAMEWORK, 'mmaction2>=1.0.0'],
    'cls': [*FRAMEWORK, 'mmpretrain>=1.0.0'],
    'export': ['onnx', 'onnxruntime', 'onnxscript'],
}


class BuildWithConfigs(build_py):
    """Puts configs and tools where mim looks for them, in bnet_mm/.mim of the wheel; the checkout stays as it is."""

    def run(self) -> None:
        super().run()
        if getattr(self, 'editable_mode', False):
            return
        mim = Path(self.build_lib) / 'bnet_mm' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)  # what an earlier build left
        checkout_only = shutil.ignore_patterns(
            '__pycache__', 'benchmark_results', 'install.sh', 'model_zoo.py', 'run_*.sh'
        )
        for folder in ('configs', 'tools'):
            shutil.copytree(ROOT / folder, mim / folder, ignore=checkout_only)
        shutil.copy(ROOT / 'model-index.yml', mim)


setup(
    name='bnet_mm',
    version=VERSION,
    description='BNET (arXiv 2011.14150) as a norm layer for the OpenMMLab libraries',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.9',
    packages=find_packages(include=['bnet_mm', 'bnet_mm.*']),
    install_requires=['torch>=2.1', 'numpy'],
    extras_require={**EXTRAS, 'all': sorted({name for names in EXTRAS.values() for name in names})},
    cmdclass={'build_py': BuildWithConfigs},
)
