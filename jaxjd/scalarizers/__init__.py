"""Scalarizers: ``(init, apply, update)`` triples that combine the losses to one loss."""

from jaxjd.scalarizers._cosmos import cosmos as cosmos
from jaxjd.scalarizers._dwa import DWAState as DWAState
from jaxjd.scalarizers._dwa import dwa as dwa
from jaxjd.scalarizers._famo import FAMOState as FAMOState
from jaxjd.scalarizers._famo import famo as famo
from jaxjd.scalarizers._fixed import constant as constant
from jaxjd.scalarizers._fixed import mean as mean
from jaxjd.scalarizers._fixed import sum as sum  # noqa: A004
from jaxjd.scalarizers._geometric_mean import geometric_mean as geometric_mean
from jaxjd.scalarizers._imtl_l import imtl_l as imtl_l
from jaxjd.scalarizers._pbi import pbi as pbi
from jaxjd.scalarizers._random import RandomState as RandomState
from jaxjd.scalarizers._random import random as random
from jaxjd.scalarizers._stch import STCHState as STCHState
from jaxjd.scalarizers._stch import stch as stch
from jaxjd.scalarizers._uw import uw as uw

__all__ = [
    "DWAState",
    "FAMOState",
    "RandomState",
    "STCHState",
    "constant",
    "cosmos",
    "dwa",
    "famo",
    "geometric_mean",
    "imtl_l",
    "mean",
    "pbi",
    "random",
    "stch",
    "sum",
    "uw",
]
