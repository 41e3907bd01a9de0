"""Checkpoints: key layouts (layouts.py, blocks.py), reading files safely (safe_load.py), conversion (convert.py)."""
