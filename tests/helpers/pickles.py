"""Pickles that are no checkpoints."""

import os


class Exploit:
    """Pickles as a call that leaves a mark on the disk."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)
