"""Peers of the benchmark: implementations of one case each."""
