"""The frontier of recall and perplexity against the memory of one sequence."""
