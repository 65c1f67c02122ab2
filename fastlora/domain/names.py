"""Names of what can be chosen, for those who need nothing else."""

from typing import Literal

Weighting = Literal["none", "importance", "label_shift"]
