"""Training: losses and gradient noise that stand in for dropout, for use in a user's own loop."""

from dropscope.training import sde as sde
from dropscope.training.dropout_k import DropoutK as DropoutK
from dropscope.training.explicit import explicit_penalty as explicit_penalty
from dropscope.training.implicit import explicit_and_implicit as explicit_and_implicit
from dropscope.training.implicit import implicit_noise as implicit_noise
from dropscope.training.modified_loss import modified_loss as modified_loss
from dropscope.training.sites import Site as Site
from dropscope.training.sites import Sites as Sites
from dropscope.training.sites import dropout_sites as dropout_sites
