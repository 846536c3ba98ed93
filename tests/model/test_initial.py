"""Whatever part of a model is drawn, it has the values of the whole."""

import torch

from k2.model.layout import logical_tensors
from k2.model.transformer import Transformer
from tests.model.reference import TINY


def test_layers_drawn_alone_are_those_of_the_model() -> None:
    whole = Transformer(TINY).initialize(3).state_dict()
    for layers in (range(1), range(1, TINY.num_hidden_layers)):
        part = Transformer(TINY, layers=layers).initialize(3).state_dict()
        assert len(part) > 5
        assert all(torch.equal(weight, whole[name]) for name, weight in part.items())


def test_matrices_are_normal_and_differ_norms_are_one_and_biases_zero() -> None:
    state = Transformer(TINY).initialize(3).state_dict()
    other = Transformer(TINY).initialize(4).state_dict()
    firsts = set()
    for tensor in logical_tensors(TINY):
        values = tensor.of(state[tensor.parameter])
        if len(tensor.shape) == 1:
            assert (values == float(tensor.group != "none")).all()
            continue
        firsts.add(float(values.flatten()[0]))
        assert not torch.equal(values, tensor.of(other[tensor.parameter]))
        assert abs(float(values.std()) / TINY.initializer_range - 1) < 5 / values.numel() ** 0.5
    assert len(firsts) == sum(len(tensor.shape) > 1 for tensor in logical_tensors(TINY))


def test_the_type_of_weights_only_rounds() -> None:
    wide, narrow = Transformer(TINY).initialize(0), Transformer(TINY).to(torch.bfloat16).initialize(0)
    for name, weight in narrow.state_dict().items():
        assert torch.equal(weight, wide.state_dict()[name].to(weight.dtype))
