"""Every Python that a test starts forbids connections out of this machine (see `no_network`).

It also searches for garbage less often: it ends soon, and most of what it makes are modules, which stay. A seventh of
the time of a command that imports JAX goes into that.
"""

import gc
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
try:
    from no_network import forbid
finally:
    sys.path.pop()

forbid()
gc.set_threshold(50_000)
