"""Memories that need no training: which heads keep every token, and which tokens the others hold."""
