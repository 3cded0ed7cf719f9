"""How an adapter lies on disk: its tensors and their checks, the compact form, and the model
card."""
