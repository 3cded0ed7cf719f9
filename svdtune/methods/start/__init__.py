"""From the weights to the factors that an adapter starts with: of a model in memory, or of a
checkpoint on disk."""
