"""Measures what a conversion kept: perplexity beside the teacher's and the controls', decoding speed, memory."""

from .controls import linear_only, window_only
from .decode import decode_speed
from .perplexity import perplexity
from .reload import logits_without_package

__all__ = ["decode_speed", "linear_only", "logits_without_package", "perplexity", "window_only"]
