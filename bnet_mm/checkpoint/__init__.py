"""Checkpoints: key layouts (layouts.py), reading files safely (safe_load.py), conversion (convert.py)."""
