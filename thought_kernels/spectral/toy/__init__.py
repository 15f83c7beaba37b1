"""Toy models of superposition, many trained at once: x' = ReLU(WᵀW x + b) on sparse x, through fewer dimensions.

    inputs      sparse inputs, a pure function of stream and step
    models      the models of a batch, their loss and its gradients in closed form
    train       Adam, checkpoints, restart
    sweep       the paper's 3,200 runs, or a reduced set of them, as one resumable command
    summary     what a trained model's spectrum says: saturation, localization, projective linearity
    evolution   spectral measures along training: Rayleigh quotients, jumps, volatility
    geometries  small models that settle in digons, triangles, tetrahedra, pentagons, square antiprisms
    figures     pictures of saved runs

`python -m thought_kernels.spectral.toy --help` lists the commands.
"""

from thought_kernels.spectral.toy.inputs import SparseInputs
from thought_kernels.spectral.toy.models import ToyModels, reconstruct, reconstruction_loss, toy_models
from thought_kernels.spectral.toy.train import Schedule, checkpoint_steps, evaluate, history, train

__all__ = [
    "Schedule",
    "SparseInputs",
    "ToyModels",
    "checkpoint_steps",
    "evaluate",
    "history",
    "reconstruct",
    "reconstruction_loss",
    "toy_models",
    "train",
]
