import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.agentic.environment import Environment
from k2.config.rl import RewardConfig
from k2.evaluation.tasks import Example, get_task
from k2.rl.critic import RuleCritic
from k2.rl.environments import TaskEnvironment
from k2.rl.prompts import Prompts, general_example
from k2.rl.rewards import Judge, Verdict, centred, decayed, total_reward

CONFIG = RewardConfig(verifier=1.0, rubric=0.2, budget_penalty=0.5)


def test_a_reward_is_the_weighted_sum_less_the_penalty_for_being_cut_off() -> None:
    parts = {"verifier": 1.0, "rubric": 0.5}
    assert total_reward(CONFIG, parts, truncated=False) == pytest.approx(1.1)
    assert total_reward(CONFIG, parts, truncated=True) == pytest.approx(0.6)


def test_verifiable_answers_are_rewarded_by_the_verifier_and_the_win_rate() -> None:
    example = get_task("addition_2").sample(0, 0)
    right = example.answer["content"]
    verdicts = Judge(CONFIG, RuleCritic()).judge(example, [right, "nope", ""], [False, False, True])
    assert [verdict.parts["verifier"] for verdict in verdicts] == [1.0, 0.0, 0.0]
    assert verdicts[0].reward > verdicts[1].reward > verdicts[2].reward


def test_agreement_counts_the_pairs_that_the_verifier_tells_apart() -> None:
    def verdict(verifier: float, rubric: float) -> Verdict:
        return Verdict(0.0, {"verifier": verifier, "rubric": rubric})

    group = [verdict(1, 0.9), verdict(1, 0.1), verdict(0, 0.5), verdict(0, 0.1)]
    assert [one.agreement(group) for one in group] == [(2.0, 2), (0.5, 2), (1.0, 2), (1.5, 2)]
    general = [Verdict(0.0, {"rubric": rubric}) for rubric in (0.0, 1.0)]
    assert general[0].agreement(general) == (0, 0)


def test_general_requests_are_rewarded_by_the_rubric_alone() -> None:
    example = general_example([{"role": "user", "content": "Hello"}])
    verdicts = Judge(CONFIG, RuleCritic()).judge(example, ["Hello there.", "Hello hello hello hello"], [False, False])
    assert set(verdicts[0].parts) == {"rubric"}
    assert verdicts[0].reward == pytest.approx(0.2)
    assert verdicts[1].reward == 0.0


def test_without_weight_nobody_is_compared() -> None:
    class Refusing(RuleCritic):
        def compare(self, *_: object) -> list[float]:
            raise AssertionError

    judge = Judge(RewardConfig(rubric=0.0), Refusing())
    assert len(judge.judge(get_task("addition_2").sample(0, 0), ["1", "2"], [False, False])) == 2


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=16))
def test_centred_rewards_sum_to_zero_and_keep_their_differences(rewards: list[float]) -> None:
    values = centred(rewards)
    assert sum(values) == pytest.approx(0, abs=1e-9)
    assert values[0] - values[-1] == pytest.approx(rewards[0] - rewards[-1])


def test_the_temperature_decays_linearly_from_first_to_last() -> None:
    assert [decayed(1.0, 0.6, step, 5) for step in range(5)] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])
    assert decayed(1.0, 0.6, 0, 1) == 1.0


def test_the_task_environment_is_a_one_turn_episode() -> None:
    environment: Environment[Example] = TaskEnvironment()
    example = get_task("tool_call").sample(0, 3)
    assert environment.reset(example, 0) == tuple(example.messages)
    assert list(environment.tools) == list(example.tools)
    saved = environment.snapshot()
    wrong = environment.step({"role": "assistant", "content": "no"})
    environment.restore(example, saved)
    right = environment.step(example.answer)
    assert wrong.done
    assert right.done
    assert (wrong.rewards["verifier"], right.rewards["verifier"]) == (0.0, 1.0)
    with pytest.raises(ValueError, match="reset"):
        TaskEnvironment().step(example.answer)


def test_prompts_are_found_again_by_their_name() -> None:
    requests = [[{"role": "user", "content": f"request {i}"}] for i in range(3)]
    prompts = Prompts({"addition_2": 1.0}, requests, 0.3, seed=4)
    names = [prompts.name(number) for number in range(300)]
    assert 0.2 < sum(name["kind"] == "general" for name in names) / 300 < 0.4
    assert names == [Prompts({"addition_2": 1.0}, requests, 0.3, seed=4).name(number) for number in range(300)]
    assert all(prompts.example(name) == prompts.example(dict(name)) for name in names[:20])
    assert {name["kind"] for name in map(Prompts({"addition_2": 1.0}, [], 0.3, 4).name, range(50))} == {"task"}
