"""Data sets: catalogue.py, readers.py, checker.py (is a folder complete?), coco.py, toy.py; a user's own: custom/."""
