"""The client's own cost: in rate against a bare loop, and in memory on a long list."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from commands import ROOT
from protocol_servers import hash_score

from polar_xtuner.client import RewardModelClient
from polar_xtuner.connection import Limits
from polar_xtuner.protocols import VLLM, ServerFacts
from polar_xtuner.rewards import candidate_of
from polar_xtuner.template import Candidate

Serve = Callable[..., AbstractContextManager[str]]
LIMITS = Limits(request_items=64)


@pytest.fixture
def serve(small: Path) -> Serve:
    """Runs a server in a process of its own; gives its URL."""
    vocab_size = json.loads((small / "base" / "config.json").read_text())["vocab_size"]

    @contextmanager
    def serving(seconds: float) -> Iterator[str]:
        command = ["--engine", "vllm", "--version", "0.32.0", "--vocab-size", vocab_size]
        server = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "protocol_servers.py"]
            + [str(word) for word in (*command, "--seconds", seconds)],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.terminate()
            server.wait(30)

    return serving


def items(count: int) -> Iterator[dict[str, str]]:
    numbers = random.Random(0)
    for i in range(count):
        a, b = numbers.randrange(1000), numbers.randrange(1000)
        yield {"prompt": f"what is {a} plus {b}", "reference": f"it is {a + b}", "output": f"{i}"}


async def bare_loop(url: str, bodies: list[bytes]) -> list[Any]:
    """As many requests at once as the client has, their bodies ready."""
    answers: list[Any] = [None] * len(bodies)
    waiting = iter(enumerate(bodies))
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(headers=headers) as session:

        async def work() -> None:
            for number, body in waiting:
                async with session.post(url + "/pooling", data=body) as response:
                    answers[number] = await response.json()

        await asyncio.gather(*(work() for _ in range(LIMITS.in_flight)))
    return answers


def test_the_rate_is_that_of_a_bare_loop(small: Path, serve: Serve) -> None:
    """At a rate of the model of 1,000 sequences a second, about that of a 7B model on 8 GPUs."""
    data = [*items(1500)]
    with (
        serve(seconds=0.001) as url,
        RewardModelClient(
            str(small / "base"), 1024, 256, "right", "vllm", url, limits=LIMITS
        ) as client,
    ):
        candidates = [candidate_of(item) for item in data]
        sequences = client.template.encode([c for c in candidates if isinstance(c, Candidate)])
        size = LIMITS.request_items
        bodies = [
            json.dumps(VLLM().request(sequences[i : i + size], ServerFacts("vllm", "", "", None)))
            for i in range(0, len(sequences), size)
        ]
        ratios: list[float] = []
        client(data[:10])
        # More often where something else holds up one side.
        while len(ratios) < 5 or (statistics.median(ratios) < 0.9 and len(ratios) < 25):
            started = time.perf_counter()
            asyncio.run(bare_loop(url, [body.encode() for body in bodies]))
            middle = time.perf_counter()
            rewards = client(data)
            ratios.append((middle - started) / (time.perf_counter() - middle))
        assert rewards == [values[-1] for values in hash_score(sequences)]
    assert statistics.median(ratios) >= 0.9, ratios


def test_a_hundred_thousand_items_take_constant_memory(small: Path, serve: Serve) -> None:
    with (
        serve(seconds=0) as url,
        RewardModelClient(str(small / "base"), 1024, 256, "right", "vllm", url) as client,
    ):
        process = psutil.Process()
        scored = client.stream(items(100_000))
        count = early = 0
        for count, one in enumerate(scored, 1):
            assert one.reward is not None
            if count == 30_000:
                early = process.memory_info().rss
        assert count == 100_000
        assert process.memory_info().rss - early < 20 * 2**20
