"""What lies in the folder of a model: source, weights, code, provenance, companion files."""
