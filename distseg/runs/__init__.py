"""The folder of a run, its checkpoints, and what a finished one gives."""
