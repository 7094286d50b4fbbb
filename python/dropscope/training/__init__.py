"""Training: losses and gradient noise that stand in for dropout, for use in a user's own loop."""

from dropscope.training import sde as sde
from dropscope.training.modified_loss import modified_loss as modified_loss
