"""Toy models of superposition, many trained at once: x' = ReLU(WᵀW x + b) on sparse x, through fewer dimensions.

    inputs      sparse inputs, a pure function of stream and step
    models      the models of a batch, their loss and its gradients in closed form
    training    Adam, checkpoints, restart
    plans       the paper's 3,200 runs, or a reduced set of them
    cost        what a plan needs: memory, disk, time
    sweeps      a plan as one resumable command
    summary     what a trained model's spectrum says: saturation, localization, projective linearity
    evolution   spectral measures along training: Rayleigh quotients, jumps, volatility
    drift       what gradient flow would do to a saved run's spectrum, beside what training did
    geometries  small models that settle in digons, triangles, tetrahedra, pentagons, square antiprisms
    figures     pictures of saved runs; those of training from evolution_rows, by training_figures

`thought-kernels toy --help` lists the commands.
"""

from thought_kernels.spectral.toy.cost import Estimate, estimate, training_seconds
from thought_kernels.spectral.toy.drift import Drift, measure_drift
from thought_kernels.spectral.toy.evolution import Evolution, spectral_evolution
from thought_kernels.spectral.toy.geometries import Found, Setting, find_geometries
from thought_kernels.spectral.toy.inputs import SparseInputs
from thought_kernels.spectral.toy.models import ToyModels, reconstruct, reconstruction_loss, toy_models
from thought_kernels.spectral.toy.plans import PRESETS, Plan
from thought_kernels.spectral.toy.summary import ModelSummary, summarize
from thought_kernels.spectral.toy.sweeps import sweep
from thought_kernels.spectral.toy.training import Schedule, checkpoint_steps, evaluate, history, train

__all__ = [
    "PRESETS",
    "Drift",
    "Estimate",
    "Evolution",
    "Found",
    "ModelSummary",
    "Plan",
    "Schedule",
    "Setting",
    "SparseInputs",
    "ToyModels",
    "checkpoint_steps",
    "estimate",
    "evaluate",
    "find_geometries",
    "history",
    "measure_drift",
    "reconstruct",
    "reconstruction_loss",
    "spectral_evolution",
    "summarize",
    "sweep",
    "toy_models",
    "train",
    "training_seconds",
]
