"""The training loop on the Trainer of transformers: steps, checkpoints, metrics, several processes."""
