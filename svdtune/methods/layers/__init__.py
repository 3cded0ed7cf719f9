"""The layers that carry adapters inside PEFT: linear, convolutional, slices of fused weights,
quantized; and merging."""
