"""Output-space training dynamics: flows, the dissipation Gramian, channel and reservoir, coupling, reports."""

from gramian._flow.controllers import AdaptiveStep, ConstantStep
from gramian._flow.flow import Flow, gradient_flow
from gramian._flow.integrator import FlowState, Integrator, StepInfo
from gramian._flow.observables import (
    ChannelFill,
    Dissipation,
    DoublingGramian,
    Evolution,
    KernelEvolution,
    Observable,
    TestKernelTop,
)
from gramian._flow.phi import FrozenKernel, freeze
from gramian._flow.reference import reference_flow
from gramian._flow.steppers import ExponentialEuler, ExponentialMidpoint, KernelPoint, Step, Stepper
from gramian._krylov import RitzPairs, ritz_pairs, sampled_density
from gramian._losses import (
    OutputLoss,
    convex_loss,
    logistic_loss,
    softmax_cross_entropy,
    squared_loss,
)
from gramian._operators import Operators, init_operators, update_operators
from gramian._problem import KernelSource
from gramian._reading.cells import Cell, four_cells
from gramian._reading.channel import AboveThreshold, Channel, ChannelRule, TraceShare, signal_channel
from gramian._reading.coupling import Coupling, coupling
from gramian._reading.fill import FillOrder, fill_order
from gramian._reading.identities import Identity, identities
from gramian._report.flow import Report, Risk, analyze
from gramian._report.run import TrainingReport, analyze_training
from gramian._run.live import LiveChannel, LiveInfo, LiveState
from gramian._run.path import RealizedOperator, RealizedPath, dense_operators
from gramian._run.recording import Recorder, Recording, record_training
from gramian._run.training import minibatches
from gramian._storage.checkpoint import Checkpoint

__all__ = [
    "AboveThreshold",
    "AdaptiveStep",
    "Cell",
    "Channel",
    "ChannelFill",
    "ChannelRule",
    "Checkpoint",
    "ConstantStep",
    "Coupling",
    "Dissipation",
    "DoublingGramian",
    "Evolution",
    "ExponentialEuler",
    "ExponentialMidpoint",
    "FillOrder",
    "Flow",
    "FlowState",
    "FrozenKernel",
    "Identity",
    "Integrator",
    "KernelEvolution",
    "KernelPoint",
    "KernelSource",
    "LiveChannel",
    "LiveInfo",
    "LiveState",
    "Observable",
    "Operators",
    "OutputLoss",
    "RealizedOperator",
    "RealizedPath",
    "Recorder",
    "Recording",
    "Report",
    "Risk",
    "RitzPairs",
    "Step",
    "StepInfo",
    "Stepper",
    "TestKernelTop",
    "TraceShare",
    "TrainingReport",
    "analyze",
    "analyze_training",
    "convex_loss",
    "coupling",
    "dense_operators",
    "fill_order",
    "four_cells",
    "freeze",
    "gradient_flow",
    "identities",
    "init_operators",
    "logistic_loss",
    "minibatches",
    "record_training",
    "reference_flow",
    "ritz_pairs",
    "sampled_density",
    "signal_channel",
    "softmax_cross_entropy",
    "squared_loss",
    "update_operators",
]
