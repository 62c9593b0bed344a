"""The stages of a recovery: what each trains, on what, and where its results lie."""
