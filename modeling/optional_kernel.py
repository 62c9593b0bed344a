"""Kernels that may fail on a machine, because they depend on its compiler and its driver; torch then does their work."""

from collections.abc import Callable
from typing import TypeVar

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)
Result = TypeVar("Result")


class OptionalKernel:
    """
    A kernel that is not tried again after its first failure. The log says once `running`, or `fallback` and the failure.

    Attributes:
        enabled: False keeps the kernel from being tried, for programs that measured something faster.
        failure: the first failure.
    """

    def __init__(self, running: str, fallback: str):
        self.running = running
        self.fallback = fallback
        self.enabled = True
        self.failure: Exception | None = None

    @property
    def usable(self) -> bool:
        """Whether to try it."""
        return self.enabled and self.failure is None

    def run(self, function: Callable[[], Result | None]) -> Result | None:
        """The result of `function`, or None if it fails; running out of memory is raised."""
        try:
            result = function()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.failure = error
            logger.warning_once(f"{self.fallback} ({type(error).__name__}: {error})")
            return None
        if result is not None:
            logger.info_once(self.running)
        return result
