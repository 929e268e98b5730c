"""What the other packages of this distribution take from this one besides its public names. Not for users."""

from entk._checks import (
    OutputSpec,
    check_apply,
    check_count,
    check_fits,
    num_params,
    pin_model,
)
from entk._jacobian import map_examples, model_precision
from entk._jaxpr import (
    CALLS,
    CUSTOM_DERIVATIVES,
    bind,
    called,
    is_jaxpr,
    is_literal,
    opened,
)
from entk._matvec import LinearOperator
from entk._ntk import Strategy
from entk._pinned import Pinned, fingerprint, pin
from entk._spectrum import SpectralDensity, nodes_and_weights
from entk._text import as_text

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
    "model_precision",
    "nodes_and_weights",
    "num_params",
    "opened",
    "pin",
    "pin_model",
]
