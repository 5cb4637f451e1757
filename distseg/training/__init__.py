"""Training: connected ranks, the loop, checkpoints, the run folder, and scoring."""
