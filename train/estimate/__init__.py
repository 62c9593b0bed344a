"""Time and memory of a recipe before it runs."""
