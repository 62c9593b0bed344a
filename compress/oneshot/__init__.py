"""One-shot pruning with mixed sparsity (arXiv 2310.09499), SparseGPT, Wanda and magnitude."""
