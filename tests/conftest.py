"""Settings that hold for every test."""

import os

# Before torch is imported: ranks share few cores, and the server that they are forked from may have no threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
