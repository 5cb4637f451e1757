"""What a run's masks are worth: whole cases segmented, counted and measured, thresholds chosen, runs compared."""
