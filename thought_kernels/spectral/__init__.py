"""What the spectrum of a weight matrix says about the features in its columns.

    frames        frame operator, Gram matrix, fractional dimensionality
    spectrum      eigenvalues and eigenspaces, grouped; the bridge between F's and M's
    measure       spectral measures and what follows: leverage, slack, saturation, moments, residual, support
    clusters      features by eigenspace: tight frames, projective linearity
    scheme        association schemes of Gram matrices
    permutations  the algebra of a given group of permutations
    geometry      names of the figures that clusters form
    taxonomy      localized, band-localized and broadband features, and their budget
    density       the empirical spectral density, stable and effective rank
    tails         power laws of its largest eigenvalues
    nulls         what matrices without structure give: Marchenko-Pastur's law, shuffled entries
    dynamics      how the spectrum moves under gradient flow
    stored        a model's matrices in its files, and its tokens
    inspect, inspect_summary      all of it for each matrix, beside its shuffled entries; by kind and for the model
    neighbours    tokens and neurons: who shares dimensions with whom
    comparison    two models, matrix by matrix
    diagnosis, site_diagnosis, overlap      what a patch touches in a model, and how two patches interfere
    written       the tokens that a patch writes towards

W is [m, n] with features in columns throughout.
"""

from thought_kernels.spectral.clusters import ClusterFit, TightFrame, projective_linearity, tight_frames
from thought_kernels.spectral.comparison import Change, compare_matrices, compare_models
from thought_kernels.spectral.density import SpectralDensity, empirical_spectral_density
from thought_kernels.spectral.diagnosis import Diagnosis, diagnose, interference
from thought_kernels.spectral.dynamics import GramFlow, angle_velocity, gradient_kernel
from thought_kernels.spectral.frames import fractional_dimensionality, frame_operator, gram
from thought_kernels.spectral.geometry import Component, identify_components, identify_geometry
from thought_kernels.spectral.inspect import MatrixRow, inspect_matrix, inspect_model
from thought_kernels.spectral.inspect_summary import KindSummary, summarise
from thought_kernels.spectral.measure import (
    FeatureMeasures,
    SpectralMeasure,
    eigenvector_residual,
    leverage,
    measure_features,
    rayleigh_quotient,
    saturation,
    slack,
    spectral_measure,
    spectral_moment,
    support_bounds,
)
from thought_kernels.spectral.neighbours import SharedFeatures, shared_features
from thought_kernels.spectral.nulls import Bulk, marchenko_pastur, null_saturation, shuffled
from thought_kernels.spectral.overlap import Interference, Overlap
from thought_kernels.spectral.permutations import centralizer_part, orbital_scheme, orbitals
from thought_kernels.spectral.scheme import AssociationScheme, association_scheme
from thought_kernels.spectral.site_diagnosis import FeatureChange, SiteDiagnosis
from thought_kernels.spectral.spectrum import FrameSpectrum, frame_spectrum
from thought_kernels.spectral.stored import StoredMatrix, stored_matrices, token_names
from thought_kernels.spectral.tails import Tail, power_law_tail
from thought_kernels.spectral.taxonomy import FeatureClasses, classify_features
from thought_kernels.spectral.written import WrittenToken, written_tokens

__all__ = [
    "AssociationScheme",
    "Bulk",
    "Change",
    "ClusterFit",
    "Component",
    "Diagnosis",
    "FeatureChange",
    "FeatureClasses",
    "FeatureMeasures",
    "FrameSpectrum",
    "GramFlow",
    "Interference",
    "KindSummary",
    "MatrixRow",
    "Overlap",
    "SharedFeatures",
    "SiteDiagnosis",
    "SpectralDensity",
    "SpectralMeasure",
    "StoredMatrix",
    "Tail",
    "TightFrame",
    "WrittenToken",
    "angle_velocity",
    "association_scheme",
    "centralizer_part",
    "classify_features",
    "compare_matrices",
    "compare_models",
    "diagnose",
    "eigenvector_residual",
    "empirical_spectral_density",
    "fractional_dimensionality",
    "frame_operator",
    "frame_spectrum",
    "gradient_kernel",
    "gram",
    "identify_components",
    "identify_geometry",
    "inspect_matrix",
    "inspect_model",
    "interference",
    "leverage",
    "marchenko_pastur",
    "measure_features",
    "null_saturation",
    "orbital_scheme",
    "orbitals",
    "power_law_tail",
    "projective_linearity",
    "rayleigh_quotient",
    "saturation",
    "shared_features",
    "shuffled",
    "slack",
    "spectral_measure",
    "spectral_moment",
    "stored_matrices",
    "summarise",
    "support_bounds",
    "tight_frames",
    "token_names",
    "written_tokens",
]
