"""Refuses jaxlib 0.10.2 at import, whose CPU backend returns silently wrong sums under ``jax.jit``.

The fault (upstream issue 39103) sits in fused reductions and raises nothing: the Jacobian of a 2-layer Transformer is
off by 17 % on 16 sequences and right on 2. 0.10.1 and 0.11.0 are right, and so is 0.10.2 with its reduction fusion
switched off by an XLA flag.

`entk` imports this module first and `gramian` imports `entk`, so both are covered. `transforms` is not: it stands
alone, and its gate works element by element. ``python -m entk.selftest`` looks for the next fault of this kind.
"""

import os
from importlib.metadata import version as installed_version

FAULTY_JAXLIB = "0.10.2"
FLAG, REPAIR = "--xla_cpu_experimental_ynn_fusion_type", "-reduce"


def refuse_faulty_jaxlib(version: str, xla_flags: str) -> None:
    """Raises ImportError for the faulty jaxlib, unless `xla_flags` switches its reduction fusion off.

    Args:
      version: jaxlib's version.
      xla_flags: the value of the environment variable ``XLA_FLAGS``. XLA reads it when its backend starts and the last
        setting of a flag wins, so it has to be set before Python starts.
    """
    settings = [flag.partition("=")[2] for flag in xla_flags.split() if flag.partition("=")[0] == FLAG]
    if version == FAULTY_JAXLIB and settings[-1:] != [REPAIR]:
        raise ImportError(
            f"jaxlib {version} returns silently wrong sums on CPU under jax.jit (upstream issue 39103). "
            f"Either install another jaxlib:\n"
            f'    pip install --upgrade jax "jaxlib!={FAULTY_JAXLIB}"\n'
            f"or switch the faulty fusion off before Python starts (XLA_FLAGS is now {xla_flags!r}):\n"
            f'    export XLA_FLAGS="$XLA_FLAGS {FLAG}={REPAIR}"'
        )


refuse_faulty_jaxlib(installed_version("jaxlib"), os.environ.get("XLA_FLAGS", ""))
