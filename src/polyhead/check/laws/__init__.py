"""The laws of attention, by subject. `LAWS` lists them in the order of the report."""
