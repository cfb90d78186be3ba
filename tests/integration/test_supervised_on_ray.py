"""Supervised stages in real Ray Train workers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import prepared_runs
import pytest
import ray
import torch
from datasets import Dataset
from safetensors.torch import load_file

from rlhf_ray import interruption
from rlhf_ray.cluster.nodes import map_in_order
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config import Config
from rlhf_ray.data.datasets import drawn_rows
from rlhf_ray.data.datasets.drawn_texts import DrawnTexts
from rlhf_ray.data.datasets.texts import TextRendering
from rlhf_ray.data.reading.rows import store_rows
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import DataError, DivergenceError, PlacementError
from rlhf_ray.models.tokenizers import load_tokenizer
from rlhf_ray.stages.supervised import pretrain
from rlhf_ray.stages.supervised.pretrain import PretrainTraining

pytestmark = pytest.mark.integration


def make_config(folder: str, mode: str, **stage: Any) -> Config:
    return prepared_runs.make_config(
        Path(folder),
        cluster={"mode": mode, "dashboard": False},
        data={"pretrain": {"path": "texts"}},
        pretrain={"steps": 8, **stage},
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to run in, with rows of text, and Ray: relative paths must hold in its workers."""
    folder = tmp_path_factory.mktemp("on_ray")
    Dataset.from_dict({"text": [f"number {i} " * 5 for i in range(100)]}).save_to_disk(
        str(folder / "texts")
    )
    before = Path.cwd()
    os.chdir(folder)
    try:
        with ray_session(make_config("unused", "local", train_workers=2)):
            yield folder
    finally:
        os.chdir(before)


def test_texts_tokenised_in_rays_processes_are_those_of_this_one(
    workplace: Path, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn_rows, "BLOCK", 7)
    given = ({"prompt": f"q{n} ", "completion": f"a{n}" * (n % 9)} for n in range(400))
    rows, renderer = store_rows(given), Renderer(load_tokenizer(llama))

    def drawn(rendering: TextRendering, *mapped: Any) -> DrawnTexts:
        return DrawnTexts(rows, rendering, 0, 0.5, "set", *mapped)

    spread = partial(map_in_order, timeout_s=60.0)
    here, there = drawn(TextRendering(renderer)), drawn(TextRendering(renderer), spread)
    for num in (20, None):  # what was tokenised ahead is not counted
        expected, texts = (list(islice(each.documents(False), num)) for each in (here, there))
        assert texts == expected
        assert there.counts == here.counts
    assert here.counts["kept"] > 300
    strict = TextRendering(renderer, max_tokens=3, overlong="error")
    with pytest.raises(DataError, match=r"set: row \d+ has \d+ tokens, more than sft.block_size 3"):
        list(drawn(strict, spread).documents(False))


class KilledTraining(PretrainTraining):
    """A stage whose second process dies once, as by the kernel's out-of-memory killer."""

    def collate(self, rows: Any) -> Any:
        is_saved = (self.checkpoints / "checkpoint-4" / "trainer_state.json").exists()
        died = self.folder / "died"
        if is_saved and torch.distributed.get_rank() == 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().collate(rows)


@pytest.mark.parametrize("zero_stage", [None, 3])
def test_two_workers_of_which_one_is_killed_train_what_one_process_trains(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    zero_stage: int | None,
) -> None:
    inline, together = f"inline-{zero_stage}", f"two-{zero_stage}"
    alone = pretrain.run(make_config(inline, "inline", zero_stage=zero_stage))
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(pretrain, "PretrainTraining", KilledTraining)
    keys = {"zero_stage": zero_stage, "trainer": {"save_steps": 4}}
    two = pretrain.run(make_config(together, "local", train_workers=2, **keys))
    said = capsys.readouterr().out
    assert "It resumes from its last checkpoint, step 4 (restart 1 of 8" in said
    assert two["loss_after"] == pytest.approx(alone["loss_after"], abs=1e-4)
    weights = [
        load_file(workplace / run / "pretrain/model/model.safetensors")
        for run in (inline, together)
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-3)
    folder = workplace / together / "pretrain"
    files = {"base", "model", "metrics.jsonl", "summary.json", "tensorboard", "died"}
    assert {path.name for path in folder.iterdir()} == files
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))


def test_an_error_in_a_worker_reaches_the_user(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = make_config(
        "wild",
        "local",
        learning_rate=1e30,
        scheduler="constant",
        trainer={"max_grad_norm": 0.0},
    )
    with pytest.raises(DivergenceError, match="the loss of step"):
        pretrain.run(wild)
    with pytest.raises(PlacementError, match="train_workers=400 needs 400 CPUs"):
        pretrain.run(make_config("many", "local", train_workers=400, batch_size=400))


def test_processes_of_a_local_run_ask_its_own_cluster_beside_others(workplace: Path) -> None:
    # Ray's state API, with which Ray Train watches its controller, looks for processes like this.
    other = 'exec -a raylet "$0" -c "import time; time.sleep(60)" --gcs-address=127.0.0.1:1'
    raylet = subprocess.Popen(["bash", "-c", other, sys.executable])

    @ray.remote(num_cpus=0)
    def addresses() -> tuple[str, str]:
        from ray._private.services import canonicalize_bootstrap_address_or_die as find

        return find(None), ray.get_runtime_context().gcs_address

    try:
        found, own = ray.get(addresses.remote())
    finally:
        raylet.kill()
        raylet.wait()
    assert found == own


@pytest.mark.slow
def test_a_signal_ends_training_on_ray_with_a_checkpoint(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("signalled", "local", train_workers=2, steps=2000)
    arrived = threading.Event()

    def signal_once_it_trains() -> None:
        while not Path("signalled/pretrain/metrics.jsonl").exists():
            time.sleep(0.05)
        arrived.set()
        interruption._state.deferring[-1](False)

    sender = threading.Thread(target=signal_once_it_trains, daemon=True)
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(config)
    assert arrived.is_set()
    work = PretrainTraining(config, Path("signalled/pretrain"), "base")
    steps, checkpoint = work.last_checkpoint()
    assert 0 < steps < 2000
    assert checkpoint is not None
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2
