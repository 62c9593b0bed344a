"""Time and memory of prefill and decoding beside softmax models."""
