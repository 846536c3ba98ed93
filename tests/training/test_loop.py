"""One step: accumulation, recomputation, bad gradients, expert balance, ranks."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from k2.config.model import ModelConfig, Recompute
from k2.config.optimizer import OptimizerConfig
from k2.data.loader import IGNORE
from k2.errors import StageError
from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from k2.optim.muonclip import MuonClip
from k2.training.batches import NextTokenLoss, TokenBatch, micro_batches
from k2.training.history import History
from k2.training.instruments import expert_shares, head_statistics
from k2.training.loop import Loss, balance_experts, train, train_step
from k2.training.state import TrainState
from tests.training.small import MODEL

LR = 0.01


def state(config: ModelConfig = MODEL, recompute: tuple[Recompute, ...] = (), **optimizer: Any) -> TrainState:
    model = Transformer(config, recompute=recompute).initialize(0)
    return TrainState(model, MuonClip(model.named_parameters(), logical_tensors(config), OptimizerConfig(**optimizer)))


def rows(count: int = 8, length: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets; rows differ in how many targets count."""
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, 64, (2, count, length))
    for row in range(count):
        targets[row, : row + 1] = IGNORE
    return tokens, targets


def weights(found: TrainState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in found.model.state_dict().items()}


def step(found: TrainState, size: int, **changes: Any) -> Any:
    return train_step(found, micro_batches(*rows(), size), NextTokenLoss(), lambda tokens: LR, **changes)


def test_accumulation_equals_one_large_batch() -> None:
    whole, parts = state(tau=0.05), state(tau=0.05)
    one, many = step(whole, 8), step(parts, 3)
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    assert many.max_logits == pytest.approx(one.max_logits, rel=1e-5)
    assert many.clipped_heads == one.clipped_heads > 0
    assert many.tokens == one.tokens == 128
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=0, atol=0.02 * LR)


def test_recomputation_changes_no_bit_and_counts_once() -> None:
    plain, again = state(tau=0.05), state(tau=0.05, recompute=("layers",))
    assert step(plain, 4) == step(again, 4)
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(plain).items())


def test_experts_without_enough_tokens_are_preferred_next_time() -> None:
    found = state(bias_update_speed=0.5)
    counts = torch.tensor([[10, 20, 30, 0]])
    balance_experts(found.model, counts, 0.5)
    bias = found.model.layers["1"].mlp.gate.e_score_correction_bias
    # signs of (mean - load) are +1, -1, -1, +1; their mean is zero
    assert bias.tolist() == [0.5, -0.5, -0.5, 0.5]
    balance_experts(found.model, torch.tensor([[0, 20, 20, 20]]), 0.5)
    assert bias.tolist() == pytest.approx([1.25, -0.75, -0.75, 0.25])


def test_a_bad_gradient_is_skipped_and_five_in_a_row_fail() -> None:
    found = state(tau=0.05, max_skipped_steps=2)
    before = weights(found)

    def poisoned(model: Transformer, batch: TokenBatch) -> Loss:
        loss = NextTokenLoss()(model, batch)
        return Loss(loss.total * float("nan"), loss.weight, loss.statistics)

    batches = micro_batches(*rows(), 8)
    for expected in (1, 2):
        report = train_step(found, batches, poisoned, lambda tokens: LR)
        assert report.skipped is not None
        assert "nan" in report.skipped
        assert (found.skipped, found.step) == (expected, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(found).items())
    assert not found.optimizer.qk_clip.counts.any()
    with pytest.raises(StageError, match="3 updates in a row"):
        train_step(found, batches, poisoned, lambda tokens: LR)


def test_a_good_step_ends_the_count_of_skipped_ones() -> None:
    found = state()
    found.skipped = 3
    assert step(found, 8).skipped is None
    assert found.skipped == 0


def test_a_loss_spike_is_skipped() -> None:
    found = state(spike_margin=0.5)
    found.mean_loss = 1.0
    before = weights(found)
    report = step(found, 8)
    assert report.skipped is not None
    assert "running mean" in report.skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(found).items())


def test_a_loss_spike_stops_the_stage_or_is_only_reported() -> None:
    stopping = state(spike_margin=0.5, spike_policy="stop")
    stopping.mean_loss = 1.0
    before = weights(stopping)
    with pytest.raises(StageError, match="spike_policy is stop"):
        step(stopping, 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(stopping).items())
    reporting = state(spike_margin=0.5, spike_policy="off")
    reporting.mean_loss = 1.0
    report = step(reporting, 8)
    assert report.skipped is None
    assert report.spike is not None
    assert (report.row()["spike"], report.row()["skipped"]) == (1, 0)
    assert not torch.equal(weights(reporting)["lm_head.weight"], before["lm_head.weight"])


def test_the_report_names_the_smallest_gamma_of_each_layer() -> None:
    found = state(tau=0.05)
    report = step(found, 4)
    assert report.gammas == pytest.approx([min(1.0, 0.05 / logit) for logit in report.max_logits])
    heads = head_statistics(found)
    assert [max(row) for row in heads["head_logits"]] == pytest.approx(report.max_logits)
    assert [min(row) for row in heads["head_gammas"]] == pytest.approx(report.gammas)
    assert sum(map(sum, heads["clip_counts"])) == report.clipped_heads


def test_expert_shares() -> None:
    assert expert_shares(torch.tensor([[10, 20, 30, 0], [5, 5, 5, 5]])) == ([2.0, 1.0], [0.0, 1.0])
    assert expert_shares(None) == ([], [])


class Listener:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.values: dict[str, Any] = {}

    def update(self, done: float, total: float, unit: str, **values: Any) -> None:
        self.values = values

    def event(self, kind: str, **values: Any) -> None:
        self.events.append((kind, values))


class Endless:
    def next_step(self) -> Any:
        return micro_batches(*rows(), 4)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_instruments_reach_the_progress_and_the_notes() -> None:
    found, listener = state(tau=0.05, spike_margin=1e-6, spike_policy="off", spectral_interval=2), Listener()
    found.mean_loss = 0.0
    train(found, Endless(), NextTokenLoss(), lambda tokens: LR, until=4, progress=listener)
    kinds = [kind for kind, _ in listener.events]
    assert kinds.count("spectral_norms") == 2
    assert kinds.count("loss_spike") >= 1
    assert kinds.count("qk_clip") == 4
    assert {"grad_norm", "update_rms", "gammas", "max_logits", "expert_floor", "tau"} <= set(listener.values)
    assert [note["step"] for note in found.notes["spectral_norms"]] == [2, 4]
    assert len(found.notes["spectral_norms"][0]["norms"]["q_b_proj"]) == 2


def test_gradients_are_clipped_to_the_norm() -> None:
    found = state(max_grad_norm=0.01)
    norm = step(found, 4).grad_norm
    gradients = [p.grad for p in found.model.parameters() if p.grad is not None]
    assert norm > 0.01
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(0.01, rel=1e-4)


def test_the_number_of_threads_changes_no_bit() -> None:
    config = MODEL.model_copy(update={"hidden_size": 128, "moe_intermediate_size": 128, "vocab_size": 512})
    tokens = np.random.default_rng(0).integers(0, 512, (8, 256))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        run = state(config, tau=0.05)
        run.model.compute_dtype = torch.bfloat16
        reports = [
            train_step(run, micro_batches(tokens, tokens, 8), NextTokenLoss(1e-4), lambda tokens: LR) for _ in range(2)
        ]
        found.append((reports, weights(run)))
    torch.set_num_threads(1)
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


def test_history_thins_and_reduces() -> None:
    history = History(interval=2)
    for i, logit in enumerate([1.0, 5.0, 3.0, 2.0, 7.0]):
        history.add({"step": i, "loss": float(i), "max_logits": [logit, -logit], "clipped_heads": 1})
    history.finish()
    assert history.curves() == {
        "step": [1, 3, 4],
        "loss": [0.5, 2.5, 4.0],
        "max_logits": [[5.0, -1.0], [3.0, -2.0], [7.0, -7.0]],
        "clipped_heads": [2, 2, 1],
    }
    history.add({"step": 5, "loss": float("nan"), "max_logits": [1.0, 1.0], "clipped_heads": 0})
    history.finish()
    assert history.curve("loss")[-1] is None
