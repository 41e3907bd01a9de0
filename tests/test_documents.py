"""The documents: what they name exists, their commands are run by tests, and the README says what the code does.

COMMANDS has a pattern for every command in them, in code blocks and in the text, with the test that runs it (smaller,
or by its functions, but the same command), or 'not run: ' and the reason. The first pattern that fits counts.
"""

import glob
import re

import pytest
import torch

from bnet_mm import host
from bnet_mm.ops import limits
from helpers.paths import REPO

PAGES = (
    'README.md',
    'tools/README.md',
    'bnet_mm/ops/README.md',
    'configs/README.md',
    'CONTRIBUTING.md',
    'configs/experiments/README.md',
)
TEXTS = {page: (REPO / page).read_text() for page in PAGES}

WHEEL = 'tests/test_wheel.py::test_use_of_the_wheel'
BACKBONE = 'tests/tools/test_convert_checkpoint.py::test_readme_command_makes_a_backbone_for_detectors'
REAL = 'tests/tools/test_real_data.py::test_training_and_evaluation_on_real_images'
TOY_DATA = 'tests/tools/test_make_toy_data.py::test_toy_data_is_seeded_and_not_overwritten'
SPEED = 'tests/tools/dev/test_benchmark.py::test_tables_are_those_of_the_rows'
COMMANDS = {
    # installation and tests
    r'(COMPARE=1 )?bash tools/run_demo\.sh': (
        'not run: installs, and trains for minutes; its config and tools are in tests/tools/'
    ),
    r'bash tools/run_tests\.sh': 'not run: runs these tests',
    r'(PYTHON=\S+ |MMCV_WHEEL=\S+ )?bash tools/install\.sh': 'tests/tools/test_install.py::test_once_and_then_nothing',
    r'\. \.venv/bin/activate': "not run: Python's own",
    r"pip install '\.\[(export|openvino)\]'": 'not run: changes the environment; tests/test_wheel.py has pip wheel',
    r'pip install (-e|--no-build-isolation )': 'not run: changes the environment; tests/test_wheel.py has pip wheel',
    r'mkdir ': "not run: the shell's own",
    r'ruff (check|format) ': 'not run: .ci/run runs it',
    r'mypy$': 'not run: a check beside the tests, as ruff',
    # training and evaluation
    r'python tools/download_weights\.py ': 'tests/tools/test_download_weights.py::test_command_line',
    r'python tools/train\.py \$CONFIG': REAL,
    r'python tools/test\.py \$CONFIG': REAL,
    r'python tools/coco_subset\.py ': REAL,
    r'python tools/train\.py CONFIG \[': 'tests/tools/test_train.py::test_train_writes_checkpoint_curve_and_evaluates',
    r'python tools/test\.py CONFIG ': 'tests/tools/test_test.py::test_test_evaluates_dumps_and_draws',
    r'python tools/test\.py \S+ Faster_R50_BNET-5\.pth': (
        'not run: the released file could not be downloaded; tests/checkpoint/test_layouts.py loads its stand-in'
    ),
    r'tools/dist_(train|test)\.sh ': 'tests/tools/test_scripts.py::test_two_processes_without_gpu',
    r'tools/slurm_(train|test)\.sh ': 'tests/tools/test_scripts.py::test_slurm_scripts_ask_for_the_right_job',
    r'mim train mmdet ': 'tests/tools/test_train.py::test_mim_train',
    r'mim (search bnet_mm |download)': WHEEL,
    r'mim (train|test) bnet_mm ': 'tests/test_wheel.py::test_mim_trains_and_tests',
    r'mim install ': 'not run: changes the environment; tests/test_wheel.py has pip wheel',
    r'torchrun ': 'tests/tools/test_scripts.py::test_strategies_in_two_processes',
    # a user's own images and data
    r'python tools/predict\.py ': 'tests/tools/test_predict.py::test_detector_finds_what_mmdet_does',
    r'python tools/my_data\.py ': 'tests/tools/test_my_data.py::test_detectors',
    r'python tools/train\.py my_config\.py': 'tests/tools/test_my_data.py::test_detectors',
    # pictures
    r'python tools/heatmap\.py ': 'tests/tools/test_heatmap.py::test_two_detectors_in_rows',
    r'python tools/taps\.py ': 'tests/tools/test_taps.py::test_table_and_picture',
    r'python tools/curves\.py ': 'tests/tools/test_curves.py::test_three_files',
    r'python tools/errors\.py ': 'tests/tools/test_errors.py::test_two_models',
    r'python tools/report\.py ': 'tests/tools/test_report.py::test_page_of_several_runs',
    r'python tools/experiment\.py ': (
        'tests/experiments/test_runs.py::test_plan_is_trained_and_a_failure_does_not_stop_it'
    ),
    r'python tools/dev/experiment_tables\.py': 'tests/tools/dev/test_experiment_tables.py::test_page_is_not_stale',
    r'ln -s ': "not run: the shell's own",
    # conversion
    r'python tools/convert_config\.py ': 'tests/tools/test_convert_config.py::test_convert_config_and_its_checkpoint',
    r'python tools/convert_checkpoint\.py .* --backbone': BACKBONE,
    r'python tools/convert_checkpoint\.py ': 'tests/tools/test_convert_checkpoint.py::test_conversion_tool',
    r'python tools/export_onnx\.py ': 'tests/engine/test_export.py::test_command_line',
    # data
    r'python tools/prepare_data\.py .*--check': 'tests/datasets/test_checker.py::test_complete_but_small',
    r'python tools/prepare_data\.py ': 'tests/datasets/test_catalogue.py::test_description',
    r'python tools/make_toy_data\.py ': TOY_DATA,
    # tables and speed
    r'python tools/dev/lock\.py': 'tests/tools/dev/test_lock.py::test_check_names_the_command',
    r'python tools/dev/cost_table\.py --check': 'tests/tools/dev/test_cost_table.py::test_check_passes',
    r'python tools/dev/cost_table\.py \[': 'tests/tools/dev/test_cost_table.py::test_formats',
    r'python tools/dev/model_zoo\.py --help': "not run: argparse's own",
    r'python tools/dev/model_zoo\.py --check': 'tests/tools/dev/test_model_zoo.py::test_nothing_is_stale',
    r'python tools/dev/model_zoo\.py': 'tests/tools/dev/test_model_zoo.py::test_what_is_stale_is_named_and_written',
    r'python tools/dev/kernel_counts\.py ': 'tests/ptx/test_counts.py::test_counts',
    r'bash tools/dev/gpu_acceptance\.sh': 'tests/tools/dev/test_gpu_acceptance.py::test_rehearsal',
    r'python tools/dev/roofline\.py ': 'tests/ptx/test_counts.py::test_roofline_is_printed',
    r'python -m pytest tests/ptx': 'not run: runs these tests',
    r'bash tools/dev/sanitize\.sh': 'not run: compiles for minutes; it shows by faults of its own that it finds some',
    r'bash tools/dev/newcomer\.sh': 'tests/tools/dev/test_newcomer.py::test_types_and_checks',
    r'bash tools/dev/matrix\.sh': 'tests/tools/dev/test_matrix.py::test_row_with_another_package',
    r'python tools/dev/matrix_table\.py --check': 'tests/tools/dev/test_matrix.py::test_page_is_not_stale',
    r'python tools/dev/mutants\.py': 'tests/tools/dev/test_mutants.py::test_changes_are_noticed',
    r'python tools/dev/benchmark\.py readme --check': SPEED,
    r'python tools/dev/benchmark\.py readme': 'not run: writes into the checkout; with --check it is run',
    r'python tools/dev/benchmark\.py ': 'not run: measures speed, for minutes and on a quiet machine',
    r'python -c .*backend_report': 'tests/ops/test_dispatch.py::test_package_without_a_working_extension',
    r'BNET_MM_BACKEND=reference python ': 'tests/ops/test_dispatch.py::test_the_variable_counts_at_each_call',
}  # fmt: skip

# Names of files that are not in the repository: the user's, the hosts', or made by a command beside them.
NOT_OURS = {
    'ImageSets/Main/train.txt', 'ImageSets/Segmentation/aug.txt', 'aug.txt', 'bnet_mm/.mim', 'bnet_mm/.mim/tools',
    'build_file_list.py', 'cityscapes.py', 'classes.txt', 'data.yaml', 'labelmap.txt', 'my_config.py',
    'tools/data/ucf101', 'train.py', 'ucf101_*_split_1_videos.txt', 'voc_aug.py',
}  # fmt: skip


def split_shell(text):
    """The simple commands of a shell text, without comments, loops and assignments."""
    text, commands, word, quote = text.replace('\\\n', ' '), [], '', ''
    for i, char in enumerate(f'{text}\n'):
        if quote == '#':
            quote = '' if char == '\n' else quote
        elif quote:
            quote = '' if char == quote else quote
        elif char == '#' and text[i - 1 : i] in ('', ' ', '\n'):
            quote = '#'
        elif char in '"\'':
            quote = char
        if char in '\n;|&' and not quote:
            commands.append(re.sub(r'\s+', ' ', word).strip())
            word = ''
        elif quote != '#':
            word += char
    commands = [re.sub(r'^do ', '', command) for command in commands]
    aside = re.compile(r"""\w+\+?=("[^"]*"|'[^']*'|\S*)|for .*|do|done|""")
    return [command for command in commands if not aside.fullmatch(command)]


def commands_of(page):
    text = TEXTS[page]
    found = [command for block in re.findall(r'```bash\n(.*?)```', text, re.S) for command in split_shell(block)]
    inline = re.findall(r'`([^`]+)`', re.sub(r'```.*?```', '', text, flags=re.S))
    start = re.compile(r'(bash|python|pip|mim|torchrun|ruff|pytest) \S|tools/\w+\.sh \S')
    return found + [' '.join(code.split()) for code in inline if start.match(code)]


ALL = [(page, command) for page in PAGES for command in commands_of(page)]


def entry_of(command):
    return next((pattern for pattern in COMMANDS if re.match(pattern, command)), None)


def test_split_shell():
    text = 'A=1 # x\nB="a;\n b"\nfor i in 1 2; do\n  C+=" $i"\n'
    text += "  run --a 'b; c' \\\n    d;  other  # no\ndone\nX=1 run && e\n"
    assert split_shell(text) == ["run --a 'b; c' d", 'other', 'X=1 run', 'e']


@pytest.mark.parametrize('page', PAGES)
def test_every_command_is_in_the_table(page):
    assert commands_of(page)
    assert [command for command in commands_of(page) if entry_of(command) is None] == []


def test_every_entry_is_needed():
    used = {entry_of(command) for _, command in ALL}
    assert [pattern for pattern in COMMANDS if pattern not in used] == []


@pytest.mark.parametrize('where', sorted(set(COMMANDS.values())))
def test_what_runs_a_command_exists(where):
    if where.startswith('not run: '):
        for path in re.findall(r'tests/\S+?(?=[\s;]|$)', where):
            assert (REPO / path).exists(), path
        return
    path, _, function = where.partition('::')
    assert f'\ndef {function}(' in (REPO / path).read_text()


def headings(page):
    """The names by which GitHub knows the headings of a page."""
    lines = re.findall(r'^#+ (.*)', page.read_text(), re.MULTILINE)
    return [re.sub(r'[^\w -]', '', line.lower()).replace(' ', '-') for line in lines]


@pytest.mark.parametrize('page', PAGES)
def test_links_and_files_exist(page):
    text, folder = TEXTS[page], (REPO / page).parent
    links = [link.partition('#') for link in re.findall(r'\]\(([^)\s]+)', text) if '://' not in link]
    assert [path for path, *_ in links if not (folder / path).exists()] == []
    pages = [(folder / path if path else REPO / page, heading) for path, _, heading in links if heading]
    assert [place for place in pages if place[1] not in headings(place[0])] == []
    paths = re.findall(r'(?<![\w./$:-])(?:bnet_mm|configs|tools|tests|\.ci)/[\w./*-]*', text)
    files = re.findall(r'`([\w./*-]+\.(?:py|sh|h|cpp|md|yml|yaml|cff|txt|csv|json|toml))`', text)
    named = {path.rstrip('.') for path in [*paths, *files] if not re.search(rf'{re.escape(path)}[<{{]', text)}
    missing = {
        path for path in named - NOT_OURS if not any(glob.glob(str(root / path.rstrip('/'))) for root in (REPO, folder))
    }
    assert named and missing == set()


def test_readme_is_short():
    assert len(TEXTS['README.md'].splitlines()) <= 150


def test_readme_has_the_table_of_effects():
    rows = [line for line in host.__doc__.splitlines() if line.startswith('|')]
    assert len(rows) == 2 + len(host.EFFECTS)
    assert '\n\n{}\n\n'.format('\n'.join(rows)) in TEXTS['README.md']


def test_options_of_the_tools_are_the_documented_ones():
    for tool in ('train.py', 'test.py'):
        line = re.search(rf'python tools/{tool} CONFIG.*', TEXTS['tools/README.md'])[0]
        source = (REPO / 'tools' / tool).read_text() + (REPO / 'bnet_mm' / 'cli.py').read_text()
        options = re.findall(r'--[\w-]+', line)
        assert options and [option for option in options if f"'{option}'" not in source] == []


def test_limits_are_those_of_the_other_places():
    """csrc/checks.h, which limits.py names, and the page on the kernels."""
    checks = (REPO / 'bnet_mm/ops/csrc/checks.h').read_text()
    assert tuple(map(int, re.findall(r'\bk == (\d+)', checks))) == limits.KERNEL_SIZES
    names = {'kFloat': torch.float32, 'kDouble': torch.float64, 'kBFloat16': torch.bfloat16, 'kHalf': torch.float16}
    line = re.search(r'inline void check_map.*?\n}', checks, re.S)[0]
    assert {names[name] for name in re.findall(r'== at::(k\w+)', line)} == set(limits.CPP_DTYPES)
    sizes = ', '.join(map(str, limits.KERNEL_SIZES))
    for backend, dtypes in (('cpp', limits.CPP_DTYPES), ('triton', limits.TRITON_DTYPES)):
        row = re.search(rf'\| `{backend}` \|.*', TEXTS['bnet_mm/ops/README.md'])[0]
        assert ', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes) in row
    assert f'k = {sizes} without dilation' in TEXTS['bnet_mm/ops/README.md']
