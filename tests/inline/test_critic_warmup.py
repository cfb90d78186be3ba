"""The first iterations of a run in which only the critic learns."""

from pathlib import Path

from harness import Harness, ledger, make_config


def test_the_critic_alone_learns_in_its_warm_up_and_rollouts_count(tmp_path: Path) -> None:
    harness = Harness(make_config(tmp_path, critic_warmup=2, iterations=5))
    summary = harness.run()
    assert harness.policy.learnt == 3
    records = harness.metrics()
    assert [record["iteration"] for record in records if "loss/policy_avg" in record] == [3, 4, 5]
    assert all("loss/value_avg" in record for record in records)
    assert summary["ledger"] == ledger(40)
    assert [record["episode"] for record in records] == [8, 16, 24, 32, 40]
    assert summary["adapter_version"] == 5
    # The policy that hasn't moved is its reference: no KL, and a coefficient that waits for one.
    assert [record["objective/kl"] for record in records[:3]] == [0, 0, 0]
    coefficients = [record["objective/kl_coef"] for record in records]
    assert coefficients[0] == coefficients[1] == coefficients[2] != coefficients[3]


def test_a_resumed_run_goes_on_where_the_whole_one_is(tmp_path: Path) -> None:
    whole = Harness(make_config(tmp_path / "whole", critic_warmup=2, iterations=5))
    whole.run()
    Harness(make_config(tmp_path / "run", critic_warmup=2, iterations=3)).run()
    resumed = Harness(make_config(tmp_path / "run", critic_warmup=2, iterations=5))
    resumed.run()
    assert resumed.policy.learnt == whole.policy.learnt == 3
    assert (resumed.policy.b_V == whole.policy.b_V).all()
    assert resumed.critic.value == whole.critic.value
    assert resumed.metrics() == whole.metrics()
