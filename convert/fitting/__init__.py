"""Fitting of the exact memory: which tokens its scores hold, and how many slots each head gets."""
