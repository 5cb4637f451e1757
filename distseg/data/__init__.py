"""From volumes on disk to batches: sources, the store, folds, the sample plan and the DALI pipeline."""
