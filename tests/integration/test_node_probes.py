"""Nodes are looked at before anything is placed on them, on a simulated cluster."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from datasets import Dataset
from prepared_runs import make_config
from ray.cluster_utils import Cluster
from simulated_clusters import simulated_cluster

from rlhf_ray.config import Config
from rlhf_ray.errors import PlacementError
from rlhf_ray.stages import pipeline

pytestmark = [pytest.mark.integration, pytest.mark.slow]

HOOK = """
import os, sys

def refuse(event, arguments):
    if event == "open" and str(arguments[0]).startswith(os.environ["TEST_HIDDEN_FOLDER"]):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])

sys.addaudithook(refuse)
"""
"""As sitecustomize on a node's path: its Python processes cannot open what lies in a folder."""


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    texts = Dataset.from_dict({"text": [f"number {i} " * 5 for i in range(20)]})
    texts.save_to_disk(str(tmp_path / "texts"))
    return tmp_path


@pytest.fixture
def cluster(folders: Path) -> Iterator[Cluster]:
    """Two nodes, the second blind to run.dir."""
    blind = {
        "TEST_HIDDEN_FOLDER": str(folders / "run"),
        "PYTHONPATH": os.pathsep.join(
            [str(folders / "hook"), str(Path(pipeline.__file__).parents[2])]
        ),
    }
    with simulated_cluster([{"env_vars": blind}]) as made:
        yield made


def config_of(folder: Path) -> Config:
    return make_config(
        folder / "run",
        run={"stages": ["pretrain"]},
        cluster={"mode": "ray"},
        placement={"gpus": 0},
        data={"pretrain": {"path": str(folder / "texts")}},
        pretrain={"steps": 2},
    )


def test_a_node_blind_to_the_runs_folder_is_named_before_any_actor_is_placed(
    cluster: Cluster, folders: Path
) -> None:
    (blind,) = cluster.worker_nodes
    with pytest.raises(PlacementError) as caught:
        pipeline.run(config_of(folders))
    named = [line for line in str(caught.value).splitlines() if "cannot read run.dir" in line]
    assert len(named) == 1
    assert blind.node_id[:8] in named[0]
    assert cluster.head_node.node_id[:8] not in str(caught.value)
    assert not list((folders / "run").glob(".probe-*"))

    ray.init(address=cluster.address)
    assert ray._private.state.actors() == {}  # dead ones would be listed as well
