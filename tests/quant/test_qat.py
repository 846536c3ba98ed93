"""Distillation against a float64 reference, and a training run that is killed and goes on."""

import copy
from statistics import median

import pytest
import torch

from k2.config.quantize import QuantizeConfig
from k2.data.loader import IGNORE
from k2.errors import UserError
from k2.quant.fake_quant import fake_quantize
from k2.quant.qat import Distillation, QuantizationAwareTraining
from k2.rl.demonstrations import task_demonstrations
from k2.training.batches import TokenBatch
from tests.quant.tiny import model, prompts, tokenizer

CONFIG = QuantizeConfig(
    tasks={"addition_1": 1.0},
    demonstrations=32,
    steps=6,
    batch_size=4,
    micro_batch_size=2,
    context_length=64,
    precision="float32",
    lr=2e-3,
    warmup_steps=1,
    checkpoint_steps=2,
    evaluation_items=4,
    evaluation_tokens=4,
)


def batch() -> TokenBatch:
    tokens = prompts(2, 12)
    targets = tokens.roll(-1, 1)
    targets[:, :4] = IGNORE
    return TokenBatch(tokens, targets)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_equals_the_definition_in_float64(temperature):
    teacher, student, data = model(0), model(1), batch()
    loss = Distillation(teacher, temperature)(student, data)
    counted = data.targets_BL != IGNORE
    with torch.no_grad():
        p, q = (
            torch.softmax(m.logits(m(data.tokens_BL)[0][counted]).double() / temperature, -1)
            for m in (teacher, student)
        )
    assert loss.weight == counted.sum()
    assert loss.total.item() == pytest.approx((p * (p.log() - q.log())).sum().item(), rel=1e-4)
    assert loss.metrics["agreement"] == (p.argmax(-1) == q.argmax(-1)).sum()


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient():
    teacher = model(0)
    student = copy.deepcopy(teacher)
    loss = Distillation(teacher)(student.requires_grad_(True), batch())
    loss.total.backward()
    assert loss.total.item() == pytest.approx(0, abs=1e-5)
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-5
    assert all(p.grad is None for p in teacher.parameters())


def test_gradient_reaches_the_masters_of_the_experts():
    teacher = model(0)
    student = copy.deepcopy(teacher)
    loss_fn = Distillation(teacher)
    student.requires_grad_(True).set_weight_transform(fake_quantize(32))
    loss = loss_fn(student, batch())
    loss.total.backward()
    assert loss.total.item() > 0
    assert all(e.gate_up_proj.grad.abs().sum() > 0 and e.down_proj.grad.abs().sum() > 0 for e in student.experts())


def test_training_recovers_what_rounding_lost():
    teacher = model(2)
    for experts in teacher.experts():
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight.data[..., ::32] *= 10  # one outlier a group, so that rounding costs something
    dialogs = task_demonstrations(tokenizer(), CONFIG.tasks, 30, 1)
    config = CONFIG.model_copy(update={"steps": 20, "lr": 3e-4, "batch_size": 8, "micro_batch_size": 8})
    student = copy.deepcopy(teacher).requires_grad_(True)
    state = QuantizationAwareTraining(config, teacher, tokenizer(), dialogs).run(student, NoCheckpoints(), Quiet())
    losses = state.history.curve("loss")
    assert median(losses[-5:]) < 0.7 * losses[0]  # every step sees all dialogs
    assert state.notes["int4"]["loss"] < 0.85 * state.notes["int4_ptq"]["loss"]
    assert state.notes["bf16"]["loss"] < 0.05 * state.notes["int4_ptq"]["loss"]


def test_no_dialog_that_fits_is_an_error():
    config = CONFIG.model_copy(update={"context_length": 16})
    dialogs = task_demonstrations(tokenizer(), {"reasoning_gym/chain_sum": 1.0}, 4, 0)
    with pytest.raises(UserError, match="context_length 16"):
        QuantizationAwareTraining(config, model(), tokenizer(), dialogs)


class NoCheckpoints:
    """Keeps nothing."""

    def restore(self, state, source):
        return None

    def step(self, state, source):
        pass


class Quiet:
    """Says nothing."""

    def update(self, done, total, unit, **values):
        pass

    def event(self, kind, **values):
        pass
