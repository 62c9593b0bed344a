"""Time and memory of prefill and decoding, next to softmax models."""
