"""What the layers compute: autograd nodes, and the Triton kernels below them."""
