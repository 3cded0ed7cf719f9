"""The laboratory: what reproduces the papers. Nothing else in svdtune needs it."""
