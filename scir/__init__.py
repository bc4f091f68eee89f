__version__ = "0.1.0"

import os

# By default, waiting OpenMP threads spin. On a busy machine, that keeps the thread they wait for off its core.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="1000")
