"""The machine of a benchmark: its description, ceilings, load and clock."""
