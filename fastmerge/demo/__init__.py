"""`fastmerge demo`: real networks, trained on the spot from real images, merged by every method and compared."""

from .command import main
from .family import Batch, DemoFamily, default_cache, prepare
from .pair import DemoPair, prepare_pair
from .sources import DataUnavailable

__all__ = ["Batch", "DataUnavailable", "DemoFamily", "DemoPair", "default_cache", "main", "prepare", "prepare_pair"]
