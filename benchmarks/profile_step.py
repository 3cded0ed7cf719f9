"""Where one training step's GPU time goes: kernels of one contender of `step.py`, by time.

python benchmarks/profile_step.py sorsa-delta --shape llama-7b
"""

import argparse

from contenders import contenders
from step import SHAPES, Run, words
from torch.profiler import ProfilerActivity, profile


def main() -> None:
    """Warm a contender up, profile two of its steps, print the heaviest kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=[contender.name for contender in contenders()])
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--rows", type=int, default=25)
    arguments = parser.parse_args()
    run = Run(words().parse_args(["--shape", arguments.shape, "--steps", "2", "--warmup", "3"]))
    (contender,) = (c for c in contenders() if c.name == arguments.contender)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run.measure(contender)
    print(
        profiler.key_averages().table(
            sort_by="self_cuda_time_total", row_limit=arguments.rows, max_name_column_width=70
        )
    )


if __name__ == "__main__":
    main()
