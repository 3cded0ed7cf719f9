"""PEFT's own tests, run on svdtune's three methods; nothing of PEFT's is kept here. Start with `make conformance`."""
