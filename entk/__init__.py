"""Per-example Jacobians and empirical neural tangent kernels in JAX."""

import entk._numerics_guard  # noqa: F401  (first: refuses a jaxlib whose results are wrong)
from entk._blocks import NtkBlocks
from entk._contractions import JacobianBlocks, PositionPairs
from entk._evolution import (
    centered_kernel_alignment,
    effective_rank,
    kernel_drift,
    principal_angles,
    target_alignment,
)
from entk._full_jacobian import FullJacobian
from entk._jacobian import jacobian
from entk._moments import GradientMoments, gradient_moments
from entk._ntk import empirical_ntk
from entk._operator import NtkOperator, ntk_vector_product
from entk._plan import plan
from entk._sharded import sharded_ntk
from entk._spectrum import spectral_density, top_eigenpairs
from entk._structured import Structured
from entk._trace import Hutchinson, XTrace, trace

__all__ = [
    "FullJacobian",
    "GradientMoments",
    "Hutchinson",
    "JacobianBlocks",
    "NtkBlocks",
    "NtkOperator",
    "PositionPairs",
    "Structured",
    "XTrace",
    "centered_kernel_alignment",
    "effective_rank",
    "empirical_ntk",
    "gradient_moments",
    "jacobian",
    "kernel_drift",
    "ntk_vector_product",
    "plan",
    "principal_angles",
    "sharded_ntk",
    "spectral_density",
    "target_alignment",
    "top_eigenpairs",
    "trace",
]
