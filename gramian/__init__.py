"""Output-space training dynamics: flows, the dissipation Gramian, channel and reservoir, coupling, reports."""

from gramian._checkpoint import Checkpoint
from gramian._controllers import AdaptiveStep, ConstantStep
from gramian._flow import Flow, gradient_flow
from gramian._frozen import FrozenKernel, freeze
from gramian._integrator import FlowState, Integrator, StepInfo
from gramian._losses import (
    OutputLoss,
    convex_loss,
    logistic_loss,
    softmax_cross_entropy,
    squared_loss,
)
from gramian._observables import (
    ChannelFill,
    DoublingGramian,
    Evolution,
    KernelEvolution,
    Observable,
    TestKernelTop,
)
from gramian._operators import Operators, init_operators, update_operators
from gramian._source import KernelSource
from gramian._steppers import ExponentialEuler, ExponentialMidpoint, KernelPoint, Step, Stepper

__all__ = [
    "AdaptiveStep",
    "ChannelFill",
    "Checkpoint",
    "ConstantStep",
    "DoublingGramian",
    "Evolution",
    "ExponentialEuler",
    "ExponentialMidpoint",
    "Flow",
    "FlowState",
    "FrozenKernel",
    "Integrator",
    "KernelEvolution",
    "KernelPoint",
    "KernelSource",
    "Observable",
    "Operators",
    "OutputLoss",
    "Step",
    "StepInfo",
    "Stepper",
    "TestKernelTop",
    "convex_loss",
    "freeze",
    "gradient_flow",
    "init_operators",
    "logistic_loss",
    "softmax_cross_entropy",
    "squared_loss",
    "update_operators",
]
