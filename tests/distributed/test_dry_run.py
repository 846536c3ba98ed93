"""Thousands of ranks in one process without memory: all of a model is there once, and every exchange is counted."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from k2.cli import main
from k2.config.load import load_config
from k2.distributed.dry_run import dry_run
from k2.errors import UserError
from k2.model.layout import parameter_counts
from k2.planner.layout import Layout

CONFIG = load_config("tiny").pretrain
LAYOUT = Layout(pp=2, ep=2, dp=2, micro_batch_tokens=CONFIG.context_length)


def test_ranks_update_every_value_once() -> None:
    found = [dry_run(CONFIG, LAYOUT, rank) for rank in range(8)]
    biases = CONFIG.model.mixture_layers * CONFIG.model.n_routed_experts
    assert sum(each.owned for each in found) == parameter_counts(CONFIG.model).total - biases
    assert all(each.parameters > each.owned > 0 for each in found)


def test_exchanges_of_a_step_are_counted() -> None:
    count = LAYOUT.micro_batches(CONFIG.batch_tokens)
    first, last = dry_run(CONFIG, LAYOUT, 0), dry_run(CONFIG, LAYOUT, 7)
    hidden = 2 * CONFIG.context_length * CONFIG.model.hidden_size
    for each in (first, last):
        assert (each.collectives["send"].count, each.collectives["send"].bytes) == (count, count * hidden)
        assert each.collectives["allreduce"].count == 6
        assert each.collectives["reduce_scatter"].count == each.collectives["allgather"].count == 2
        assert each.collectives["reduce_scatter"].bytes >= 4 * each.parameters
    exchanges = [dry_run(CONFIG, LAYOUT, rank).collectives["alltoall"] for rank in (0, 4)]
    times, rows = CONFIG.model.mixture_layers * count, CONFIG.context_length * CONFIG.model.num_experts_per_tok
    # Counts of rows; tokens and weights there and their gradients back; outputs back and their gradients there.
    assert sum(each.count for each in exchanges) == 7 * times
    each_time = 8 * CONFIG.model.n_routed_experts + rows * (4 * 2 * CONFIG.model.hidden_size + 2 * 4)
    assert sum(each.bytes for each in exchanges) == pytest.approx(each_time * times, rel=1e-6)


def test_more_layers_and_heads_are_no_more_reductions() -> None:
    shape = {"num_hidden_layers": 6, "num_attention_heads": 2 * CONFIG.model.num_attention_heads}
    larger = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update=shape)})
    here, there = (dry_run(config, LAYOUT, 0).collectives["allreduce"] for config in (CONFIG, larger))
    assert here.count == there.count
    heads = [config.model.num_hidden_layers * config.model.num_attention_heads for config in (CONFIG, larger)]
    counts = [config.model.mixture_layers * config.model.n_routed_experts for config in (CONFIG, larger)]
    assert there.bytes - here.bytes == 4 * (heads[1] - heads[0] + counts[1] - counts[0])


@pytest.mark.parametrize(
    ("layout", "rank", "reason"),
    [(Layout(ep=7), 0, "does not divide"), (LAYOUT, 8, "rank 8: the layout has 8")],
)
def test_what_cannot_be_is_refused(layout: Layout, rank: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        dry_run(CONFIG, layout, rank)


def test_the_command_adds_it() -> None:
    layout = "pp=8,ep=16,dp=2,micro_batch_tokens=8192"
    arguments = ["plan", "moonlight-16b", "--cluster", "h800-256", "--layout", layout, "--dry-run", "255", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["dry_run"]["collectives"]["alltoall"]["count"] > 0


@pytest.mark.slow
def test_two_thousand_ranks_of_k2_take_less_than_a_minute_and_8_gib() -> None:
    code = """
import json, resource, time
from k2.config.load import load_config
from k2.distributed.dry_run import dry_run
from k2.planner.layout import Layout
start = time.process_time()
found = dry_run(load_config("k2-1t").pretrain, Layout(pp=16, ep=16, dp=8), 2047)
seconds, memory = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps([seconds, memory, found.parameters, found.collectives["reduce_scatter"].count, found.text()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, memory, parameters, count, text = json.loads(done.stdout)
    print(f"{seconds:.1f} s of CPU, {memory:.2f} GiB\\n{text}")
    assert seconds < 60
    assert memory < 8
    assert 3e9 < parameters < 8e9
    assert count > 2
