"""Output-space training dynamics: flows, the dissipation Gramian, channel and reservoir, coupling, reports."""

from gramian._cells import Cell, four_cells
from gramian._channel import AboveThreshold, Channel, ChannelRule, TraceShare, signal_channel
from gramian._checkpoint import Checkpoint
from gramian._controllers import AdaptiveStep, ConstantStep
from gramian._coupling import Coupling, coupling
from gramian._fill import FillOrder, fill_order
from gramian._flow import Flow, gradient_flow
from gramian._frozen import FrozenKernel, freeze
from gramian._identities import Identity, identities
from gramian._integrator import FlowState, Integrator, StepInfo
from gramian._krylov import RitzPairs, ritz_pairs, sampled_density
from gramian._live import LiveChannel, LiveInfo, LiveState
from gramian._losses import (
    OutputLoss,
    convex_loss,
    logistic_loss,
    softmax_cross_entropy,
    squared_loss,
)
from gramian._observables import (
    ChannelFill,
    Dissipation,
    DoublingGramian,
    Evolution,
    KernelEvolution,
    Observable,
    TestKernelTop,
)
from gramian._operators import Operators, init_operators, update_operators
from gramian._realized import RealizedOperator, RealizedPath, dense_operators
from gramian._recording import Recorder, Recording, record_training
from gramian._reference import reference_flow
from gramian._report import Report, Risk, analyze
from gramian._source import KernelSource
from gramian._steppers import ExponentialEuler, ExponentialMidpoint, KernelPoint, Step, Stepper
from gramian._training_report import TrainingReport, analyze_training
from gramian._training_steps import minibatches

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
