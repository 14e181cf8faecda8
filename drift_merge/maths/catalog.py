"""What a user must know of each merge method, without torch; see `methods.table`."""

from drift_merge.maths.methods import METHODS as METHODS
from drift_merge.maths.methods.table import Method as Method
