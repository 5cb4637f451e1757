"""The scores that there are, by name. A requirement on one that there is not is refused before anything is imported for it."""

SCORES = ("dice", "iou", "precision", "sensitivity", "specificity")
TOLERANCES_MM = (1, 2)
SURFACE_SCORES = (*(f"nsd_{mm}mm" for mm in TOLERANCES_MM), "hd95_mm")
VOLUMES = ("truth_ml", "predicted_ml", "volume_error_ml")
ALL_SCORES = (*SCORES, *SURFACE_SCORES, *VOLUMES)
MEANS = {"per_patient": ALL_SCORES, "per_slice": SCORES, "pooled": SCORES}  # of a region, besides those over volumes
EMPTY_COUNTS = ("n_empty_truth", "n_empty_prediction")
