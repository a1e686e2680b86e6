"""Servers in trouble: what becomes of what was asked of them, and how soon."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from protocol_servers import (
    Hang,
    Server,
    Status,
    busy,
    first,
    hash_score,
    running,
    slow,
)

from polar_xtuner import connection
from polar_xtuner.client import Encoded, RewardModelClient
from polar_xtuner.connection import Limits
from polar_xtuner.golden import GOLDEN, Golden, GoldenRow, rows_to_score, write_golden
from polar_xtuner.protocols import ServerError
from polar_xtuner.rewards import RewardError, candidate_of
from polar_xtuner.template import Candidate

Connect = Callable[..., RewardModelClient]


@pytest.fixture(scope="module")
def folder(small: Path) -> Path:
    return small / "base"


@pytest.fixture(scope="module")
def vocab_size(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


@pytest.fixture
def connect(folder: Path) -> Iterator[Connect]:
    made = []

    def client(engine: str, *addresses: str, path: Path = folder, **options: Any) -> Any:
        limits = Limits(**{"retry_delay": 0.02, "timeout": 5.0, **options.pop("limits", {})})
        made.append(
            RewardModelClient(
                str(path), 1024, 256, "right", engine, addresses, limits=limits, **options
            )
        )
        return made[-1]

    yield client
    for one in made:
        one.close()


def items(count: int, seed: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"what is {seed}", "reference": "r", "output": f"{i}"} for i in range(count)]


def expected(client: RewardModelClient, data: list[dict[str, str]], score: Any = hash_score) -> Any:
    candidates = [candidate_of(item) for item in data]
    return [values[-1] for values in score(client.template.encode(candidates))]


class Limiter:
    """429 to all but `most` requests at a time."""

    def __init__(self, most: int, retry_after: str = "0") -> None:
        self.most = most
        self.retry_after = retry_after
        self.server: Server | None = None

    def __call__(self, number: int, body: Any) -> Any:
        assert self.server is not None
        return busy(self.retry_after) if self.server.in_flight > self.most else None


@pytest.mark.parametrize("most", [1, 2])
def test_a_server_that_limits_requests_loses_no_item(
    most: int, vocab_size: int, connect: Connect
) -> None:
    data = items(600)
    limiter = Limiter(most)
    score = slow(hash_score, 0.001)
    with running("vllm", "0.32.0", score, vocab_size=vocab_size, fault=limiter) as server:
        limiter.server = server
        client = connect("vllm", server.address, limits={"request_items": 32})
        assert client(data) == expected(client, data)
        assert server.requests_received < 120


@pytest.mark.parametrize("bad", [{0, 1, 2}, {0, 1, 2, 4, 8, 16, 32}, set(range(20, 40))])
def test_items_that_a_server_fails_at_take_no_other_with_them(
    bad: set[int], vocab_size: int, connect: Connect
) -> None:
    data = items(64)
    with running("lmdeploy", "0.18.0", hash_score, vocab_size=vocab_size) as server:
        limits = {"max_retries": 3, "retry_delay": 0.005}
        client = connect("lmdeploy", server.address, on_error="none", limits=limits)
        poison = [client.template.encode([candidate_of(data[i])])[0] for i in bad]
        server.fault = lambda number, body: (
            Status() if any(ids in poison for ids in body["input"]) else None
        )
        rewards = client(data)
        assert {*rewards.errors} == bad
        good = [i for i in range(64) if i not in bad]
        assert [rewards[i] for i in good] == expected(client, [data[i] for i in good])
        assert all("fails at it" in error for error in rewards.errors.values())


def test_an_outage_takes_the_same_time_for_many_items(connect: Connect) -> None:
    limits = {"request_items": 1, "max_retries": 3, "retry_delay": 0.1}
    client = connect("vllm", "127.0.0.1:9", on_error="none", limits=limits)
    started = time.monotonic()
    rewards = client(items(2000))
    assert time.monotonic() - started < 20
    assert len(rewards.errors) == 2000
    assert "no server answers" in rewards.errors[1999]


def test_a_server_that_fails_at_everything_is_given_up_in_bounded_time(
    vocab_size: int, connect: Connect
) -> None:
    with running("vllm", "0.32.0", hash_score, vocab_size=vocab_size) as server:
        limits = {"request_items": 8, "max_retries": 3}
        client = connect("vllm", server.address, on_error="none", limits=limits)
        client(items(1, seed=9))
        server.fault = first(10**6, Status())
        started = time.monotonic()
        assert len(client(items(200)).errors) == 200
        assert time.monotonic() - started < 10
        assert server.requests_received < 200
        server.fault = first(0, Status())
        assert client(items(5)) == expected(client, items(5))


def test_a_server_that_hangs_does_not_hold_up_the_others(vocab_size: int, connect: Connect) -> None:
    hung = socket.create_server(("127.0.0.1", 0))
    with running("vllm", "0.32.0", hash_score, vocab_size=vocab_size) as good:
        client = connect(
            "vllm",
            good.address,
            f"127.0.0.1:{hung.getsockname()[1]}",
            limits={"timeout": 1.0, "request_items": 4},
        )
        started = time.monotonic()
        assert client(items(200)) == expected(client, items(200))
        assert time.monotonic() - started < 5
    hung.close()


def test_a_server_changed_while_idle_is_looked_at_again(
    vocab_size: int, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "KEEP_ALIVE", 0.2)
    with running("vllm", "0.10.0", hash_score, vocab_size=vocab_size) as server:
        client = connect("vllm", server.address)
        client(items(2))
    time.sleep(0.4)
    with (
        running("vllm", "0.10.2", hash_score, vocab_size=vocab_size, port=server.port),
        pytest.raises(ServerError, match="softmax"),
    ):
        client(items(2))


def golden_of(folder: Path, target: Path, score: Any) -> Path:
    """The checkpoint with golden scores that `score` gives."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    with RewardModelClient(str(folder), 2048, 512) as client:
        candidates = [one for one in map(candidate_of, rows_to_score()) if type(one) is Candidate]
        sequences = client.template.encode(candidates)
    rows = tuple(
        GoldenRow(*candidate, tuple(ids), values[-1])
        for candidate, ids, values in zip(candidates, sequences, score(sequences))
    )
    tolerances = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-1}
    write_golden(target, Golden(rows, tolerances, "float32", GOLDEN))
    return target


def other_score(sequences: list[list[int]]) -> list[list[float]]:
    return [[value + 1 for value in values] for values in hash_score(sequences)]


def test_other_weights_on_the_same_address_are_noticed(
    folder: Path,
    vocab_size: int,
    connect: Connect,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "KEEP_ALIVE", 0.2)
    path = golden_of(folder, tmp_path / "model", hash_score)
    with running("sglang", "0.5.23", hash_score, vocab_size=vocab_size) as server:
        client = connect("sglang", server.address, path=path)
        client(items(2))
        before = server.items_answered
        time.sleep(0.4)
        client(items(2))
        assert server.items_answered - before < 12  # looked at in short
    time.sleep(0.4)
    with (
        running("sglang", "0.5.23", other_score, vocab_size=vocab_size, port=server.port),
        pytest.raises(ServerError, match="golden scores"),
    ):
        client(items(2))


def test_a_wrong_server_is_asked_once_and_the_work_stops(
    folder: Path, vocab_size: int, connect: Connect, tmp_path: Path
) -> None:
    path = golden_of(folder, tmp_path / "model", hash_score)
    with running("vllm", "0.32.0", other_score, vocab_size=vocab_size) as server:
        client = connect("vllm", server.address, path=path)
        with pytest.raises(ServerError, match=f"{server.address}.*golden scores"):
            client(items(2000))
        with pytest.raises(ServerError, match="golden scores"):
            asyncio.run(client.ascore(items(2000, seed=1)))
        time.sleep(0.5)
        assert server.items_answered <= 2 * len(rows_to_score())


def test_right_rewards_between_0_and_1_are_accepted(
    folder: Path, vocab_size: int, connect: Connect, tmp_path: Path
) -> None:
    def young(sequences: list[list[int]]) -> list[list[float]]:
        return [[(value + 12) / 17 for value in values] for values in hash_score(sequences)]

    path = golden_of(folder, tmp_path / "model", young)
    for engine, version in (("sglang", "0.5.23"), ("vllm", "0.32.0")):
        with running(engine, version, young, vocab_size=vocab_size) as server:
            client = connect(engine, server.address, path=path)
            assert client.verify("float32").ok
            assert client(items(3)) == pytest.approx(expected(client, items(3), young))


def test_closing_ends_the_calls_under_way(vocab_size: int, connect: Connect) -> None:
    with running("vllm", "0.32.0", slow(hash_score, 0.02), vocab_size=vocab_size) as server:
        client = connect("vllm", server.address, verify=False)
        found: list[Any] = []

        def call() -> None:
            try:
                found.append(client(items(150)))
            except ServerError as error:
                found.append(str(error))

        thread = threading.Thread(target=call)
        thread.start()
        time.sleep(0.5)
        client.close()
        thread.join(5)
        assert found == ["the client was closed"]
        assert client(items(1)) == expected(client, items(1))


def test_what_was_cancelled_holds_up_nothing(vocab_size: int, connect: Connect) -> None:
    with running("vllm", "0.32.0", hash_score, vocab_size=vocab_size) as server:
        client = connect("vllm", server.address, limits={"request_items": 4, "timeout": 1.0})
        client(items(1, seed=9))
        server.fault = first(10**6, Hang())

        async def cancelled() -> None:
            await asyncio.wait_for(client.ascore(items(600)), 0.3)

        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(cancelled())
        server.fault = first(0, Hang())
        started = time.monotonic()
        assert client(items(3)) == expected(client, items(3))
        assert time.monotonic() - started < 5


def test_encode_takes_any_iterable_and_requests_only_framed_ids(
    vocab_size: int, connect: Connect
) -> None:
    with running("sglang", "0.5.23", hash_score, vocab_size=vocab_size) as server:
        client = connect("sglang", server.address)
        encoded = client.encode(iter(items(3)))
        assert client.sglang_request_reward(encoded) == expected(client, items(3))
        for ids in ([], [5, 6, 7], [1, vocab_size + 5, encoded[0].ids[-1]]):
            with pytest.raises(RewardError, match="ids"):
                client.sglang_request_reward([Encoded("x", ids)])
        assert server.is_alive


def test_passwords_of_netrc_and_addresses_stay_here(
    folder: Path,
    vocab_size: int,
    connect: Connect,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with running("vllm", "0.32.0", hash_score, vocab_size=vocab_size) as server:
        client = connect("vllm", server.address, api_key="key")
        assert client(items(2)) == expected(client, items(2))
    with pytest.raises(ValueError, match="without user and password") as raised:
        RewardModelClient(str(folder), server_address="http://me:secret@127.0.0.1:9")
    assert "secret" not in str(raised.value)
    with pytest.raises(ValueError, match="ftp"):
        RewardModelClient(str(folder), server_address="ftp://127.0.0.1:9")
    with pytest.raises(ValueError, match="dtype must be one of"):
        RewardModelClient(str(folder), dtype="fp32")
