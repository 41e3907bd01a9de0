"""Plans: what they refuse, and those of configs/experiments."""

import copy

import pytest
import torch
import yaml
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import set_random_seed

from bnet_mm.cli import UserError
from bnet_mm.experiments.plan import read_plan
from bnet_mm.experiments.runs import DONE, read_results
from helpers.hosts import import_host_models
from helpers.paths import REPO

PLANS = sorted(REPO.glob('configs/experiments/*.yml'))
GOOD = dict(
    about='', base='base.py', metric='accuracy/top1', seeds=2,
    variants={'BN': None, 'BNET-3': dict(than='BN')},
    claims=[dict(source='Table 2', says='better', printed=0.7, variant='BNET-3', than='BN')],
)  # fmt: skip


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(seeds=0), 'seeds is a number above 0, got 0'),
        (dict(seed=3), 'has no field seed; did you mean seeds?'),
        (dict(variants=['BN']), 'variants is a mapping of names'),
        (dict(variants={'BN': dict(than='BNET-3'), 'BNET-3': None}), "than names a variant above it, got 'BNET-3'"),
        (dict(variants={'BN': dict(processes=0)}), 'processes is a number above 0, got 0'),
        (dict(variants={'BN': dict(optoins={})}), 'did you mean options?'),
        (dict(variants={'BN': dict(weights='BN')}), "weights is PLAN/VARIANT, got 'BN'"),
        (dict(variants={'BN': dict(options='k=3')}), "options is a mapping of places in the config, got 'k=3'"),
        (dict(claims=None), 'claims is a list, got None'),
        (dict(claims=[{**GOOD['claims'][0], 'printed': '+0.7 AP'}]), "printed is a number, got '+0.7 AP'"),
        (dict(base='other.py'), 'base is a config beside the plan'),
        (dict(claims=[dict(source='', says='', printed=1, variant='SN', than='BN')]), 'variant is one of BN, BNET-3'),
        (dict(claims=[dict(source='', says='', variant='BN', than='BN')]), 'lacks printed'),
        (dict(claims=[{**GOOD['claims'][0], 'of': 'first'}]), "of is one of last, mean, got 'first'"),
    ],
)
def test_wrong_plans(tmp_path, change, message):
    (tmp_path / 'base.py').write_text('model = dict()')
    (tmp_path / 'plan.yml').write_text(yaml.safe_dump({**GOOD, **change}))
    with pytest.raises(UserError) as error:
        read_plan(tmp_path / 'plan.yml')
    assert message in str(error.value)


def test_missing_fields_and_files(tmp_path):
    with pytest.raises(UserError, match='cannot be read'):
        read_plan(tmp_path / 'none.yml')
    (tmp_path / 'plan.yml').write_text('seeds: 3')
    with pytest.raises(UserError, match='lacks about, base, metric, variants, claims'):
        read_plan(tmp_path / 'plan.yml')


def test_order_gives_whole_comparisons_early(make_plan):
    assert [(variant.name, seed) for variant, seed in make_plan(seeds=2).runs()] == [
        ('BN', 0), ('BNET-3', 0), ('BN', 1), ('BNET-3', 1),
    ]  # fmt: skip


def test_digest_changes_with_any_setting_but_not_with_the_seed(make_plan, tmp_path):
    plan = make_plan(seeds=1)
    before = {name: plan.digest(variant) for name, variant in plan.variants.items()}
    assert before['BN'] != before['BNET-3']
    again = make_plan(seeds=2)
    assert {name: again.digest(variant) for name, variant in again.variants.items()} == before
    more = make_plan(
        more='plain: {}\n  first: {weights: first/BN}\n  second: {weights: second/BN}\n  two: {processes: 2}'
    )
    digests = {name: more.digest(variant) for name, variant in more.variants.items()}
    assert digests['plain'] == before['BN'] and len({digests[name] for name in ('BN', 'first', 'second', 'two')}) == 4
    base = tmp_path / 'base.py'
    base.write_text(base.read_text().replace('batch_size=4', 'batch_size=2'))
    assert all(again.digest(variant) != before[name] for name, variant in again.variants.items())


def test_digest_is_not_that_of_a_folder(make_plan, tmp_path):
    plan, base = make_plan(), tmp_path / 'base.py'
    text = base.read_text()

    def digest(folder, file):
        moved = text.replace(f"'{tmp_path / 'data'}'", repr(folder))
        base.write_text(f'{moved}\nval_evaluator = dict(ann_file=data_root.rstrip("/") + "/{file}")')
        return plan.digest(plan.variants['BN'])

    assert digest('here', 'val.json') == digest('/over/there/', 'val.json') != digest('here', 'train.json')


FEW = ('detection', 'imagenette_resnet', 'transfer')
BUILT = [pytest.param(path, id=path.stem, marks=() if path.stem in FEW else pytest.mark.configs) for path in PLANS]


@pytest.mark.parametrize('path', BUILT)
def test_committed_plans_build_and_share_their_start(path):
    """Every variant of a plan, and that all convolutions and the classifier start as in what it is compared with."""
    plan = read_plan(path)
    for variant in plan.variants.values():
        cfg = plan.config(variant, seed=3)
        import_host_models(cfg.default_scope)
        init_default_scope(cfg.default_scope)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            hook = cfg.custom_hooks[-1]
            assert (hook.type, hook.seed, cfg.randomness.seed) == ('PairedRun', 3, 3)
            model = MODELS.build(copy.deepcopy(cfg.model))
            image = torch.randn(2, 3, 96, 96)
            if variant.than is None or variant.weights:
                assert hook.start is None
                continue
            set_random_seed(3)
            start = MODELS.build(copy.deepcopy(hook.start))
            start.init_weights()
            convolutions = [name for name, value in start.state_dict().items() if value.dim() in (2, 4)]
            shared = {name: start.state_dict()[name] for name in convolutions}
            assert len(shared) > 15 and not set(shared) - set(model.state_dict())
            assert model.eval().extract_feat(image)[0].shape == start.eval().extract_feat(image)[0].shape
            assert plan.config(plan.variants[variant.than], 3).model == hook.start


@pytest.mark.parametrize('path', PLANS, ids=lambda path: path.stem)
def test_results_are_those_of_the_plan(path):
    """No run is left out before a later seed has begun, none is there twice, and none is of other settings."""
    plan = read_plan(path)
    results = read_results(plan.csv)
    keys = [result.key for result in results]
    planned = [(variant.name, seed) for variant, seed in plan.runs()]
    assert len(set(keys)) == len(keys) and set(keys) <= set(planned)
    done = {(result.variant, result.config) for result in results if result.status == DONE}
    assert done == {(name, plan.digest(plan.variants[name])) for name, _ in done}
    others = [read_plan(other).csv for other in PLANS if other != path]
    shared = {(result.config, result.seed) for csv in others for result in read_results(csv)}
    own = [planned.index(result.key) for result in results if (result.config, result.seed) not in shared]
    if own:
        before = planned[: max(own) + 1]
        late = [key for key in before if key not in keys]
        assert len(late) <= 1, f'{late} before {before[-1]} are missing'
