"""Recipes (`recipes/*.yaml`) and DeepSpeed settings (`deepspeed/*.json`), shipped with the package."""
