"""Which release of a library is installed, for tests of what came with one."""

import transformers

TRANSFORMERS_4 = int(transformers.__version__.split(".")[0]) < 5
