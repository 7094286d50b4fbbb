"""Analyses: one measurement a file, each built from operators, spectra and the problem."""

from dropscope.analyses.alignment import Alignment as Alignment
from dropscope.analyses.condensation import Condensation as Condensation
from dropscope.analyses.condensation import condensation as condensation
from dropscope.analyses.flatness import IntervalFlatness as IntervalFlatness
from dropscope.analyses.flatness import interval_flatness as interval_flatness
from dropscope.analyses.follow import NoiseStructure as NoiseStructure
from dropscope.analyses.follow import NoiseTrace as NoiseTrace
from dropscope.analyses.follow import follow as follow
from dropscope.analyses.follow import noise_structure as noise_structure
from dropscope.analyses.hessian_variance import HessianVariance as HessianVariance
from dropscope.analyses.hessian_variance import hessian_variance as hessian_variance
from dropscope.analyses.loss_line import LossLine as LossLine
from dropscope.analyses.loss_line import loss_line as loss_line
from dropscope.analyses.loss_plane import LossPlane as LossPlane
from dropscope.analyses.loss_plane import loss_plane as loss_plane
from dropscope.analyses.noise_collect import gradient_data as gradient_data
from dropscope.analyses.noise_collect import trajectory_data as trajectory_data
from dropscope.analyses.noise_data import NoiseData as NoiseData
from dropscope.analyses.noise_data import noise_data as noise_data
from dropscope.analyses.power_law import PowerLaw as PowerLaw
from dropscope.analyses.power_law import fit_power_law as fit_power_law
from dropscope.analyses.variance_flatness import VarianceFlatness as VarianceFlatness
from dropscope.analyses.variance_flatness import variance_flatness as variance_flatness
