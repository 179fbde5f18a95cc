"""Distil a large Vision Transformer into a small one, in stages of image resolution."""

__version__ = "0.1.0"
