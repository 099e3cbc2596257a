"""Weightings: ``(init, update)`` pairs that turn a statistic of the Jacobian into weights."""

from jaxjd.weightings._aligned_mtl import aligned_mtl as aligned_mtl
from jaxjd.weightings._cagrad import cagrad as cagrad
from jaxjd.weightings._cr_mogm import CRMOGMState as CRMOGMState
from jaxjd.weightings._cr_mogm import cr_mogm as cr_mogm
from jaxjd.weightings._excess_mtl import ExcessMTLState as ExcessMTLState
from jaxjd.weightings._excess_mtl import excess_mtl as excess_mtl
from jaxjd.weightings._fixed import constant as constant
from jaxjd.weightings._fixed import mean as mean
from jaxjd.weightings._fixed import sum as sum  # noqa: A004
from jaxjd.weightings._flattening import flattening as flattening
from jaxjd.weightings._gradvac import GradVacState as GradVacState
from jaxjd.weightings._gradvac import gradvac as gradvac
from jaxjd.weightings._imtl_g import imtl_g as imtl_g
from jaxjd.weightings._mgda import mgda as mgda
from jaxjd.weightings._modo import MoDoState as MoDoState
from jaxjd.weightings._modo import modo as modo
from jaxjd.weightings._pcgrad import PCGradState as PCGradState
from jaxjd.weightings._pcgrad import pcgrad as pcgrad
from jaxjd.weightings._random import RandomState as RandomState
from jaxjd.weightings._random import random as random
from jaxjd.weightings._sdmgrad import SDMGradState as SDMGradState
from jaxjd.weightings._sdmgrad import sdmgrad as sdmgrad
from jaxjd.weightings._upgrad import dualproj as dualproj
from jaxjd.weightings._upgrad import upgrad as upgrad

__all__ = [
    "CRMOGMState",
    "ExcessMTLState",
    "GradVacState",
    "MoDoState",
    "PCGradState",
    "RandomState",
    "SDMGradState",
    "aligned_mtl",
    "cagrad",
    "constant",
    "cr_mogm",
    "dualproj",
    "excess_mtl",
    "flattening",
    "gradvac",
    "imtl_g",
    "mean",
    "mgda",
    "modo",
    "pcgrad",
    "random",
    "sdmgrad",
    "sum",
    "upgrad",
]
