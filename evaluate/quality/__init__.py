"""Quality of a student beside its teacher, baselines and ablations."""
