"""Per-example Jacobians and empirical neural tangent kernels in JAX."""

import entk._numerics_guard  # noqa: F401  (first: refuses a jaxlib whose results are wrong)
from entk._kernels.blocks import NtkBlocks
from entk._kernels.full_jacobian import FullJacobian
from entk._kernels.jacobian import jacobian
from entk._kernels.moments import GradientMoments, gradient_moments
from entk._kernels.ntk import empirical_ntk
from entk._kernels.operator import NtkOperator, ntk_vector_product
from entk._kernels.sharded import sharded_ntk
from entk._spectra.evolution import (
    centered_kernel_alignment,
    effective_rank,
    kernel_drift,
    principal_angles,
    target_alignment,
)
from entk._spectra.spectrum import spectral_density, top_eigenpairs
from entk._spectra.trace import Hutchinson, XTrace, trace
from entk._structured.contractions import JacobianBlocks, PositionPairs
from entk._structured.plan import plan
from entk._structured.strategy import Structured

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
