"""Package metadata. The OpenMMLab frameworks are extras: the maintained forks have other names, same imports.

The CPU kernels (bnet_mm/ops/csrc) are compiled where torch and a C++ compiler are at hand; otherwise the package is
pure Python and runs on torch's own operators. torch is only at hand with `pip install --no-build-isolation`.
"""

import re
import shutil
import sys
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
    'download': ['gdown>=6; python_version >= "3.10"'],
    'analysis': ['tidecv', 'matplotlib', 'pycocotools'],
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
        checkout_only = shutil.ignore_patterns('__pycache__', 'dev', 'install.sh', 'run_*.sh')
        for folder in ('configs', 'tools'):
            shutil.copytree(ROOT / folder, mim / folder, ignore=checkout_only)
        shutil.copy(ROOT / 'model-index.yml', mim)


def extensions() -> dict:
    """The compiled CPU kernels as arguments of setup(), or a line that says why there are none."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print(
            'bnet_mm: no torch at hand (use --no-build-isolation), so no CPU kernels; plain torch is used',
            file=sys.stderr,
        )
        return {}

    class BuildIfPossible(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # whatever the compiler or its absence raises
                print(f'bnet_mm: the CPU kernels could not be compiled, plain torch is used: {error}', file=sys.stderr)
                self.extensions = []

    # OpenMP at compile time only: the library that torch has loaded serves the extension, too.
    flags = ['-O3', '-g0', '-fopenmp'] if sys.platform == 'linux' else ['-O3', '-g0']
    sources, headers = (sorted(map(str, Path('bnet_mm/ops/csrc').glob(f'*.{ending}'))) for ending in ('cpp', 'h'))
    kernels = CppExtension('bnet_mm._cpu', sources, depends=headers, extra_compile_args=flags)
    return dict(ext_modules=[kernels], cmdclass={'build_ext': BuildIfPossible})


extension = extensions()
setup(
    name='bnet_mm',
    version=VERSION,
    description='BNET (arXiv 2011.14150) as a norm layer for the OpenMMLab libraries',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.9',
    packages=find_packages(include=['bnet_mm', 'bnet_mm.*']),
    package_data={'bnet_mm': ['py.typed', 'ops/README.md', 'visualization/page.html']},
    install_requires=['torch>=2.1', 'numpy'],
    extras_require={
        **EXTRAS,
        'all': sorted({name for names in EXTRAS.values() for name in names}),
        'openvino': ['openvino'],  # another runtime for exported models, beside 'export'
    },
    ext_modules=extension.get('ext_modules', []),
    cmdclass={'build_py': BuildWithConfigs, **extension.get('cmdclass', {})},
)
