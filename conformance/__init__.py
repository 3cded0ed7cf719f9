"""PEFT's own tests, run on svdtune's three methods; nothing of PEFT's is kept here. Start with
`make conformance`."""

import os

# Before anything imports huggingface_hub, which reads it once: the models are built here, and no
# test may wait for a network. Some of PEFT's tests load an adapter onto another random model, which
# svdtune refuses unless it is told not to look.
os.environ |= {"HF_HUB_OFFLINE": "1", "SVDTUNE_CACHE": "off", "SVDTUNE_BASE_CHECK": "off"}
