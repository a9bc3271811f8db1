"""Beside the tests run the processes that kernels/conftest.py starts, and whatever else the machine has to do: an OpenMP
thread that waits for one that has no core must sleep. Those that spin take the very core: with two busy programs on two
cores, tests of parallel operators took 84 s instead of 23 s. OpenMP reads this once, when torch is imported."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
