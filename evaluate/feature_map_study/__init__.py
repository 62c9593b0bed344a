"""Error of the feature maps as estimates of the softmax kernel exp(q.k)."""
