"""Putting a cluster together: the command line, the local launcher, the demo and the benchmarks."""
