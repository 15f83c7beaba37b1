"""What the spectrum of a weight matrix says about the features in its columns.

    frames        frame operator, Gram matrix, fractional dimensionality
    spectrum      eigenvalues and eigenspaces, grouped; the bridge between F's and M's
    measure       spectral measures and what follows: leverage, slack, saturation, moments, residual, support

W is [m, n] with features in columns throughout.
"""

from thought_kernels.spectral.frames import fractional_dimensionality, frame_operator, gram
from thought_kernels.spectral.measure import (
    FeatureMeasures,
    SpectralMeasure,
    leverage,
    measure_features,
    saturation,
    slack,
    spectral_measure,
    spectral_moment,
    support_bounds,
)
from thought_kernels.spectral.spectrum import FrameSpectrum, frame_spectrum

__all__ = [
    "FeatureMeasures",
    "FrameSpectrum",
    "SpectralMeasure",
    "fractional_dimensionality",
    "frame_operator",
    "frame_spectrum",
    "gram",
    "leverage",
    "measure_features",
    "saturation",
    "slack",
    "spectral_measure",
    "spectral_moment",
    "support_bounds",
]
