"""Errors that say that another rank is gone, as gloo words them (torch 2.14)."""

import pytest

from distseg.training.watch import is_lost_rank


@pytest.mark.parametrize(
    "text",
    [
        "[gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.78.0.2]:4260.",
        "[gloo/transport/tcp/pair.cc:545] Read error [10.77.0.2]:33487: Connection reset by peer.",
        "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete",
        "Application timeout caused pair closure",
    ],
)
def test_a_lost_rank_is_told_by_what_gloo_says(text: str) -> None:
    assert is_lost_rank(RuntimeError(text)) and not is_lost_rank(ValueError(text))


def test_a_programming_error_is_not_a_lost_rank() -> None:
    assert not is_lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))
