"""Package metadata. The OpenMMLab frameworks are extras: the maintained forks have other names, same imports."""

import re
from pathlib import Path

from setuptools import find_packages, setup

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
)
