"""Kernels in PyTorch, after the two ways of its own tutorial on neural tangent kernels, on what torch.func offers."""

from __future__ import annotations

from _protocol import load, serve, spec  # isort: skip  (pins the process before PyTorch counts its cores)

import torch  # pyright: ignore[reportMissingImports]
from torch.func import jacrev, jvp, vjp, vmap  # pyright: ignore[reportMissingImports]
from torch_models import FAMILIES, prepare


def jacobian_contraction(apply, w, x):
    """Per-example Jacobians, contracted parameter by parameter into one matrix (the tutorial stacks the parts)."""

    def ntk():
        jac = vmap(jacrev(apply), (None, 0))(w, x)
        total = None
        while jac:
            leaf = jac.popitem()[1].flatten(2).flatten(0, 1)
            total = leaf @ leaf.T if total is None else total.addmm_(leaf, leaf.T)
        return total

    return ntk


def ntk_vector_products(apply, w, x):
    """K's blocks as products with unit vectors: no Jacobian is held, but a forward pass is made for every entry.

    The tutorial maps over pairs of examples at once, which no memory holds here: one example of the rows at a time.
    """

    def block(x1, x2):
        out, pull = vjp(lambda w: apply(w, x1), w)

        def column(unit):
            return jvp(lambda w: apply(w, x2), (w,), pull(unit))[1]

        return vmap(column)(torch.eye(out.numel()))

    def ntk():
        blocks = vmap(vmap(block, (None, 0)), (0, None), chunk_size=1)(x, x)
        n1, n2, c, _ = blocks.shape
        return blocks.transpose(1, 2).reshape(n1 * c, n2 * c)

    return ntk


VARIANTS = {"jacobian contraction": jacobian_contraction, "NTK-vector products": ntk_vector_products}


def main():
    torch.set_num_threads(len(spec["cores"]))
    torch.set_num_interop_threads(1)
    torch.set_grad_enabled(False)  # torch.func does its own differentiation
    w, x = prepare(spec["family"], spec["sizes"], load())
    apply = FAMILIES[spec["family"]](**spec["sizes"])
    serve(VARIANTS[spec["variant"]](apply, w, x), lambda kernel: kernel.numpy(), torch=torch.__version__)


if __name__ == "__main__":
    main()
