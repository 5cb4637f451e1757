"""Several nodes, really: network namespaces joined by a bridge; see tests/nodes.py."""

from pathlib import Path

import pytest

from tests.nodes import Scene, namespaces_problem

pytestmark = [pytest.mark.dist, pytest.mark.slow(60), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def scene(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    if problem := namespaces_problem():
        pytest.skip(problem)
    return Scene(store, tmp_path_factory.mktemp("nodes"))


def test_two_nodes_train_as_one(scene: Scene) -> None:
    assert scene.no_fault()["bit_equal"]


def test_a_link_that_is_cut_fails_fast_and_the_job_starts_again_and_ends_with_the_same_bits(scene: Scene) -> None:
    row = scene.link_cut()
    assert row["bit_equal"] and row["samples_once"] and row["steps"] and row["lost_steps"] <= 4, row
    logs = "".join(path.read_text() for path in scene.folder.glob("node*.log"))
    assert "error: rank 0, step" in logs and "a rank is gone or did not answer" in logs


def test_a_node_that_goes_is_done_without_and_taken_in_again(scene: Scene) -> None:
    row = scene.node_killed_and_back()
    assert row["samples_once"] and row["steps"], row
