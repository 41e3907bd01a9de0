"""Paired experiments: plan.py (what is compared), runs.py (trains it), paired.py (statistics), tables.py (results)."""
