"""Recipes: their dataclasses, how YAML becomes one, and which keys have no effect."""
