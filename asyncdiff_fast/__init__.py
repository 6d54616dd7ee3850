"""asyncdiff_fast: one image or video faster, by several devices at once.

`patch(pipe, num_stages=2)` lets the ranks of a torchrun share each call of the pipeline's denoiser; `unpatch(pipe)` undoes it;
`print(plan(pipe, num_stages=2))` shows who would do what.
"""

from .config import Config
from .patching import device, patch, plan, unpatch
from .world import ExchangeError

__version__ = "0.1.0"
__all__ = ["Config", "ExchangeError", "__version__", "device", "patch", "plan", "unpatch"]
