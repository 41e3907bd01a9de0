"""A user's own data: folder.py, formats.py, labels.py and masks.py read it, checks.py looks at it.

output.py and config.py write, trial.py runs a batch.
"""
