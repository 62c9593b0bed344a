"""Quality of a student next to its teacher, baselines and ablations."""
