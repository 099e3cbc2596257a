"""How far apart two float32 results may be, given how the tests are compiled."""

import os

UNFUSED = 1.0 if "xla_backend_optimization_level=3" in os.environ["XLA_FLAGS"] else 2.0
"""A factor on tolerances of a few ulps. Without optimizations every product is rounded before it is
added, where optimized code has fused multiply-adds: sums of many terms lose up to a bit more."""
