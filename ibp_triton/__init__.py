"""Invariant Backpropagation and its rivals as drop-in losses for PyTorch."""

__version__ = "0.1.0"
