"""Label trees for `jaxjd.partition` and `jaxjd.grouped`; the code is in `jaxjd.grouping.labels`."""

from jaxjd.grouping.labels import by_layer as by_layer
from jaxjd.grouping.labels import by_network as by_network
from jaxjd.grouping.labels import by_rules as by_rules
from jaxjd.grouping.labels import by_tensor as by_tensor
from jaxjd.grouping.labels import together as together

__all__ = ["by_layer", "by_network", "by_rules", "by_tensor", "together"]
