"""The microbenchmark suite: operators on every backend against the reference, rivals and the machine's ceilings."""
