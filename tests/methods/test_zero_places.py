"""Where ZeRO 3 keeps a process's part of a factor, without DeepSpeed: what `ZeroFactors` reads of
it, stood in for."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from svdtune.methods.sorsa.config import SorsaConfig
from svdtune.methods.sorsa.zero import Partition, ZeroFactors


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(0, Partition(0, 7, 0, 2)), (4, Partition(0, 7, 8, 1)), (5, None), (7, None)],
    ids=["whole", "cut off", "at the end", "beyond the end"],
)
def test_a_process_beyond_the_end_of_a_small_factor_has_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch, rank: int, expected: Partition | None
) -> None:
    factor = nn.Parameter(torch.zeros(9, 1))
    factor.ds_numel, factor.ds_process_group = 9, None
    zero = SimpleNamespace(fp16_groups=[[factor]], grad_position={0: (0, 7, 2)}, get_param_id=lambda _: 0)
    monkeypatch.setattr(dist, "get_rank", lambda group: rank)
    assert ZeroFactors(zero, [(factor, SorsaConfig())]).place(0, factor) == expected
