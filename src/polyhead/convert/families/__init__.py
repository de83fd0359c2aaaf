"""Model families: the layout of each one's attention weights, and how its options are read."""
