"""Probes: facts about a module or function that the laws need, found from calls and weights."""
