"""What the other packages of this distribution take from this one besides its public names. Not for users."""

from entk._batching import map_examples
from entk._checks.apply import OutputSpec, check_apply, pin_model
from entk._checks.counts import check_count
from entk._checks.memory import check_fits
from entk._kernels.strategy import Strategy
from entk._parameters import num_params
from entk._precision import matmul, model_precision
from entk._spectra.protocol import LinearOperator
from entk._spectra.spectrum import SpectralDensity, nodes_and_weights
from entk._text import as_text
from entk._tracing.jaxpr import CALLS, CUSTOM_DERIVATIVES, bind, called, is_jaxpr, is_literal, opened
from entk._tracing.pinned import Pinned, fingerprint, pin

__all__ = [
    "CALLS",
    "CUSTOM_DERIVATIVES",
    "LinearOperator",
    "OutputSpec",
    "Pinned",
    "SpectralDensity",
    "Strategy",
    "as_text",
    "bind",
    "called",
    "check_apply",
    "check_count",
    "check_fits",
    "fingerprint",
    "is_jaxpr",
    "is_literal",
    "map_examples",
    "matmul",
    "model_precision",
    "nodes_and_weights",
    "num_params",
    "opened",
    "pin",
    "pin_model",
]
