"""``plain_trainer`` in shards where there is no GPU: accelerate, which shards on GPUs alone, is
told that its processes have one each.

accelerate launch --use_fsdp ... -m tests.sharded_trainer MODEL UNITS DATA.jsonl OUTPUT [BATCH]
"""

import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from tests import plain_trainer


def set_device(state: PartialState) -> None:
    """The last step in which accelerate looks at where it is."""
    state.device, state.distributed_type = torch.device("cpu"), DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.set_device = set_device
    plain_trainer.main(*sys.argv[1:])
