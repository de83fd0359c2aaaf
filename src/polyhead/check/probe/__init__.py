"""Probes: facts of a module or function that the laws need, learned from calls and weights."""
