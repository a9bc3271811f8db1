"""fastmerge: an accelerated engine that merges trained neural networks into one."""

__version__ = "0.1.0"
