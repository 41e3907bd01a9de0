"""tools/prepare_data.py as a user runs it."""


def test_refusals(tmp_path, prepare_data):
    code, _, err = prepare_data('voc', tmp_path / 'no', '--check')
    assert code == 2 and f'{tmp_path}/no is not a folder' in err
    assert '--any-size goes with --check' in prepare_data('voc', '--any-size')[2]
