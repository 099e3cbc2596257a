"""Weightings: ``(init, update)`` pairs that turn a statistic of the Jacobian into weights."""

from jaxjd.weightings._aligned_mtl import aligned_mtl as aligned_mtl
from jaxjd.weightings._cagrad import cagrad as cagrad
from jaxjd.weightings._conflict_free import conflict_free as conflict_free
from jaxjd.weightings._cr_mogm import CRMOGMState as CRMOGMState
from jaxjd.weightings._cr_mogm import cr_mogm as cr_mogm
from jaxjd.weightings._db_mtl import DBMTLState as DBMTLState
from jaxjd.weightings._db_mtl import db_mtl as db_mtl
from jaxjd.weightings._excess_mtl import ExcessMTLState as ExcessMTLState
from jaxjd.weightings._excess_mtl import excess_mtl as excess_mtl
from jaxjd.weightings._fairgrad import fairgrad as fairgrad
from jaxjd.weightings._fixed import constant as constant
from jaxjd.weightings._fixed import mean as mean
from jaxjd.weightings._fixed import sum as sum  # noqa: A004
from jaxjd.weightings._flattening import flattening as flattening
from jaxjd.weightings._gradnorm import GradNormState as GradNormState
from jaxjd.weightings._gradnorm import gradnorm as gradnorm
from jaxjd.weightings._gradvac import GradVacState as GradVacState
from jaxjd.weightings._gradvac import gradvac as gradvac
from jaxjd.weightings._imtl_g import imtl_g as imtl_g
from jaxjd.weightings._krum import krum as krum
from jaxjd.weightings._mgda import mgda as mgda
from jaxjd.weightings._moco import MoCoState as MoCoState
from jaxjd.weightings._moco import moco as moco
from jaxjd.weightings._modo import MoDoState as MoDoState
from jaxjd.weightings._modo import modo as modo
from jaxjd.weightings._nash_mtl import NashMTLState as NashMTLState
from jaxjd.weightings._nash_mtl import nash_mtl as nash_mtl
from jaxjd.weightings._pcd import PCDState as PCDState
from jaxjd.weightings._pcd import pcd as pcd
from jaxjd.weightings._pcgrad import PCGradState as PCGradState
from jaxjd.weightings._pcgrad import pcgrad as pcgrad
from jaxjd.weightings._random import RandomState as RandomState
from jaxjd.weightings._random import random as random
from jaxjd.weightings._sdmgrad import SDMGradState as SDMGradState
from jaxjd.weightings._sdmgrad import sdmgrad as sdmgrad
from jaxjd.weightings._stch import STCHState as STCHState
from jaxjd.weightings._stch import stch as stch
from jaxjd.weightings._upgrad import dualproj as dualproj
from jaxjd.weightings._upgrad import upgrad as upgrad

__all__ = [
    "CRMOGMState",
    "DBMTLState",
    "ExcessMTLState",
    "GradNormState",
    "GradVacState",
    "MoCoState",
    "MoDoState",
    "NashMTLState",
    "PCDState",
    "PCGradState",
    "RandomState",
    "SDMGradState",
    "STCHState",
    "aligned_mtl",
    "cagrad",
    "conflict_free",
    "constant",
    "cr_mogm",
    "db_mtl",
    "dualproj",
    "excess_mtl",
    "flattening",
    "gradnorm",
    "gradvac",
    "imtl_g",
    "krum",
    "mean",
    "mgda",
    "moco",
    "modo",
    "fairgrad",
    "nash_mtl",
    "pcd",
    "pcgrad",
    "random",
    "sdmgrad",
    "stch",
    "sum",
    "upgrad",
]
