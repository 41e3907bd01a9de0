"""How models are trained and run: hooks.py, runner.py (checked checkpoints), processes.py (without GPU)."""
