"""The embedded sample: a chest CT that is computed, patient by patient."""
