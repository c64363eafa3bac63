"""Every Python that a test starts forbids connections out of this machine; see `no_network`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
try:
    from no_network import forbid
finally:
    sys.path.pop()

forbid()
