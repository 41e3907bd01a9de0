"""Pictures and tables of what BNET does: pure functions of models, runs and predictions; the tools write the files."""
