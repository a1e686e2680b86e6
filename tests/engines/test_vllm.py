"""Rewards through real vLLM servers: those of the training model, whatever the server's flags."""

from __future__ import annotations

import asyncio
import json
import math
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from polar_xtuner.client import RewardModelClient
from polar_xtuner.connection import Limits
from polar_xtuner.protocols import ServerError

TOLERANCE = 1e-4
IN_ONE_REQUEST = Limits(request_items=600, request_tokens=10**6)

both = pytest.mark.parametrize("server", ["default flags", "raw flags"], indirect=True)
one = pytest.mark.parametrize("server", ["default flags"], indirect=True)


@pytest.fixture(scope="session")
def client(server: str, scored: Any) -> Iterator[RewardModelClient]:
    with client_of(scored.folder, server) as client:
        yield client


def client_of(folder: object, server: str, **settings: Any) -> RewardModelClient:
    return RewardModelClient(str(folder), server_type="vllm", server_address=server, **settings)


def requests_answered(server: str) -> int:
    """Requests for rewards, by the server's own count."""
    with urllib.request.urlopen(f"http://{server}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    counted = [line for line in lines if line.startswith("http_requests_total{")]
    return sum(int(float(line.split()[-1])) for line in counted if 'handler="/pooling"' in line)


@both
def test_the_server_itself_answers_what_its_flags_say(
    server: str, scored: Any, request: pytest.FixtureRequest
) -> None:
    question = json.dumps({"input": scored.ids[:3]}).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"http://{server}/pooling", question, headers)
    ) as answer:
        values = [entry["data"][-1][0] for entry in json.load(answer)["data"]]
    expected = scored.rewards[:3]
    if request.node.callspec.params["server"] == "default flags":
        expected = [1 / (1 + math.exp(-reward)) for reward in expected]
    assert values == pytest.approx(expected, abs=TOLERANCE)


@both
def test_200_items_one_a_call(client: RewardModelClient, scored: Any, record_property: Any) -> None:
    sample = scored.sample
    off = sample.off([client(item)[0] for item in sample.items])
    record_property("off by", f"{off:.1e}")
    assert len(sample.items) == 200
    assert off <= TOLERANCE


@both
def test_600_items_in_one_call(
    client: RewardModelClient, scored: Any, record_property: Any
) -> None:
    off = scored.off(client(scored.items))
    record_property("off by", f"{off:.1e}")
    assert len(scored.items) == 600
    assert off <= TOLERANCE


@both
def test_600_encoded_items_in_one_request(server: str, scored: Any, record_property: Any) -> None:
    with client_of(scored.folder, server, limits=IN_ONE_REQUEST) as client:
        encoded = client.encode(scored.items)
        client.vllm_request_reward(encoded[0])  # so that what a new server is asked is behind us
        before = requests_answered(server)
        off = scored.off(client.vllm_request_reward(encoded))
        assert requests_answered(server) == before + 1
    record_property("off by", f"{off:.1e}")
    assert off <= TOLERANCE


@both
def test_async_calls_of_one_item_and_of_all(
    client: RewardModelClient, scored: Any, record_property: Any
) -> None:
    async def ask() -> tuple[list[Any], list[Any]]:
        singles = await asyncio.gather(*map(client.ascore, scored.sample.items))
        return [rewards[0] for rewards in singles], await client.ascore(scored.items)

    singles, together = asyncio.run(ask())
    offs = scored.sample.off(singles), scored.off(together)
    record_property("off by", f"{max(offs):.1e}")
    assert max(offs) <= TOLERANCE


@both
def test_verify_accepts_the_model_and_rejects_one_with_a_layer_1_percent_off(
    client: RewardModelClient, server: str, scored: Any, record_property: Any
) -> None:
    found = client.verify(dtype="float32")
    record_property("golden scores off by", f"{found.max_difference:.1e}")
    assert found.ok, found.problems
    with client_of(scored.other, server) as other:
        assert not other.verify(dtype="float32").ok
        with pytest.raises(ServerError):
            other(scored.items[0])


@one
def test_what_the_server_is_not_gives_no_rewards(server: str, scored: Any) -> None:
    path = str(scored.folder)
    with (
        RewardModelClient(path, server_type="sglang", server_address=server) as client,
        pytest.raises(ServerError, match="vllm"),
    ):
        client(scored.items[0])
    with (
        client_of(path, server, model="another") as client,
        pytest.raises((ServerError, ValueError)),
    ):
        client(scored.items[0])
