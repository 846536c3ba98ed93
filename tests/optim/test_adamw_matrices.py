"""`matrices: adamw` is AdamW for every weight, against torch's own."""

import torch

from k2.config.optimizer import OptimizerConfig
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from tests.optim.tiny import TINY


def test_every_weight_moves_as_under_torchs_adamw() -> None:
    ours, theirs = Transformer(TINY).initialize(3), Transformer(TINY).initialize(3)
    config = OptimizerConfig(matrices="adamw", tau=None)
    optimizer = MuonClip(ours.named_parameters(), logical_tensors(TINY), config, lr=0.01)
    peer = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        optimizer.step()
        peer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
