"""How much the loss depends on each matrix, by several measures."""
