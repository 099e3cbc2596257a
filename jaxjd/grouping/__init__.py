"""Grouping: aggregation per group of parameters, by label trees."""

from jaxjd.grouping._grouped import GroupedState as GroupedState
from jaxjd.grouping._grouped import grouped as grouped
from jaxjd.grouping._partition import PartitionState as PartitionState
from jaxjd.grouping._partition import partition as partition

__all__ = ["GroupedState", "PartitionState", "grouped", "partition"]
