"""The client against stand-ins of the serving engines, with real and with cheap scores behind them.

What the engines answer is replayed by `protocol_servers.py`; a real vLLM is in `engines/`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import random
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from commands import ROOT
from protocol_servers import (
    ENGINES,
    UNAVAILABLE,
    CutShort,
    Die,
    ErrorWithStatus200,
    Hang,
    NotANumber,
    Omit,
    Reset,
    Shuffle,
    Status,
    at,
    busy,
    first,
    hash_score,
    random_faults,
    running,
    slow,
    tiny_model,
)
from transformers import AutoModel, AutoTokenizer

from polar_xtuner.client import Encoded, RewardModelClient
from polar_xtuner.connection import Limits
from polar_xtuner.protocols import ServerError
from polar_xtuner.rewards import CALIBRATION, RewardError, candidate_of
from polar_xtuner.template import Candidate

SECRET = "kumquat"
SIGMOID = [("vllm", "0.10.2")]
"""Those that answer sigmoid(reward) whatever a request says, unless started otherwise."""

IMPATIENT = Limits(timeout=3.0, retry_delay=0.05, max_retries=3, request_items=16)


@pytest.fixture(scope="module")
def folder(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small checkpoint whose rewards differ."""
    folder = tmp_path_factory.mktemp("client") / "model"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    demo.write_base(folder, demo.build_tokenizer(), 0, **shape)
    weights = torch.load(folder / "pytorch_model.bin")
    torch.manual_seed(1)
    weights["v_head.weight"].normal_(std=1.0)
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def vocab_size(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


Connect = Callable[..., RewardModelClient]


@pytest.fixture
def connect(folder: Path) -> Iterator[Connect]:
    """Makes clients of the checkpoint, and closes them in the end."""
    made = []

    def client(engine: str, *addresses: str, limits: Limits = IMPATIENT, **options: Any) -> Any:
        options = {"max_length": 1024, "max_response_length": 256, **options}
        made.append(
            RewardModelClient(
                str(folder), server_type=engine, server_address=addresses, limits=limits, **options
            )
        )
        return made[-1]

    yield client
    for one in made:
        one.close()


def items(count: int, seed: int = 0) -> list[dict[str, Any]]:
    numbers = random.Random(seed)
    return [
        {
            "prompt": f"what is {i} plus {numbers.randrange(100)}",
            "reference": [{"role": "assistant", "content": f"it is {numbers.randrange(100)}"}],
            "output": " ".join(f"so {numbers.randrange(100)}" for _ in range(i % 9)),
        }
        for i in range(count)
    ]


def expected(client: RewardModelClient, data: list[dict[str, Any]], score: Any = hash_score) -> Any:
    candidates = [candidate_of(item) for item in data]
    assert all(isinstance(one, Candidate) for one in candidates)
    return [values[-1] for values in score(client.template.encode(candidates))]


# ---- every engine


@pytest.mark.parametrize(("engine", "version"), ENGINES)
@pytest.mark.parametrize("raw", [True, False])
def test_every_engine_gives_the_models_rewards_or_is_refused(
    engine: str, version: str, raw: bool, folder: Path, vocab_size: int, connect: Connect
) -> None:
    score = tiny_model(folder)
    data = items(20)
    with running(engine, version, score, vocab_size=vocab_size, raw=raw) as server:
        client = connect(engine, server.address)
        if (engine, version) in SIGMOID and not raw:
            with pytest.raises(ServerError, match=r"--override-pooler-config.*softmax"):
                client(data)
            return
        rewards = client(data)
        assert rewards == pytest.approx(expected(client, data, score), abs=1e-5)
        assert client(data[:1]) == client(data[0]) == pytest.approx(rewards[:1], abs=1e-6)
        assert asyncio.run(client.ascore(data)) == rewards
        assert [one.reward for one in client.stream(iter(data))] == rewards
        assert server.is_alive


@pytest.mark.parametrize("version", [v for e, v in ENGINES if e == "vllm"])
def test_one_value_an_input_is_read_the_same_way(
    version: str, vocab_size: int, connect: Connect
) -> None:
    data = items(20)
    with running("vllm", version, hash_score, vocab_size=vocab_size, raw=True, step=True) as server:
        client = connect("vllm", server.address)
        assert client(data) == expected(client, data)


@pytest.mark.parametrize("served", ENGINES[4::2])
@pytest.mark.parametrize("named", ["vllm", "sglang", "lmdeploy"])
def test_another_engine_than_server_type_says_is_refused(
    served: tuple[str, str], named: str, vocab_size: int, connect: Connect
) -> None:
    if served[0] == named:
        return
    with (
        running(*served, hash_score, vocab_size=vocab_size) as server,
        pytest.raises(ServerError, match=f"is {served[0]}, not {named}: set server_type"),
    ):
        connect(named, server.address)(items(2))
        assert server.items_answered == 0


def test_a_server_that_is_no_engine_is_refused(connect: Connect) -> None:
    with serving_404() as address, pytest.raises(ServerError, match="no engine that is known"):
        connect("vllm", address)(items(2))


def serving_404() -> Any:
    from contextlib import contextmanager
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *args: Any) -> None:
            pass

    @contextmanager
    def serve() -> Iterator[str]:
        server = HTTPServer(("127.0.0.1", 0), Nothing)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
        server.server_close()

    return serve()


def test_a_model_that_is_not_served_is_an_error(vocab_size: int, connect: Connect) -> None:
    with (
        running("vllm", "0.32.0", hash_score, vocab_size=vocab_size) as server,
        pytest.raises(ServerError, match=r"404.*does not serve other there"),
    ):
        connect("vllm", server.address, model="other", on_error="none")(items(2))


def test_a_server_whose_model_does_not_pool_is_an_error(vocab_size: int, connect: Connect) -> None:
    fault = first(1000, ErrorWithStatus200())
    with (
        running("vllm", "0.10.2", hash_score, vocab_size=vocab_size, fault=fault) as server,
        pytest.raises(ServerError, match="does not support Pooling API"),
    ):
        connect("vllm", server.address)(items(2))


# ---- items


def test_equal_items_are_asked_once_and_results_keep_their_order(
    vocab_size: int, connect: Connect
) -> None:
    data = items(30) * 4
    random.Random(0).shuffle(data)
    with running("vllm", "0.32.0", hash_score, vocab_size=vocab_size) as server:
        client = connect("vllm", server.address)
        client(data[0])
        before = server.items_answered
        assert client(data) == expected(client, data)
        assert server.items_answered - before == 30


BAD = [
    ({"reference": SECRET, "output": SECRET}, "prompt: is missing"),
    ({"prompt": SECRET, "output": SECRET}, "reference: is missing"),
    ({"prompt": SECRET, "reference": 3.25, "output": SECRET}, "reference: .*found float"),
    ({"prompt": SECRET, "reference": "a", "output": [SECRET]}, r"output\[0\]: .*found str"),
    ({"prompt": SECRET, "reference": "a", "output": None}, "output: .*found null"),
    ({"prompt": SECRET, "reference": "a", "output": SECRET + "\ud800"}, "lone surrogate"),
    (
        {"prompt": SECRET, "reference": "a", "output": "", "wrapper": SECRET},
        "wrapper: .* found str",
    ),
    (SECRET, "must be a dict .* found str"),
]


def test_a_bad_item_costs_no_other_its_reward(
    vocab_size: int, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    good = items(20)
    data: list[Any] = [*good[:10], *(item for item, _ in BAD), *good[10:]]
    with running("vllm", "0.32.0", hash_score, vocab_size=vocab_size) as server:
        client = connect("vllm", server.address, on_error="none")
        rewards = client(data)
        assert [*rewards[:10], *rewards[10 + len(BAD) :]] == expected(client, good)
        assert [*rewards.errors] == [*range(10, 10 + len(BAD))]
        for (_, pattern), error in zip(BAD, rewards.errors.values()):
            assert re.search(pattern, error), error
        strict = connect("vllm", server.address)
        with pytest.raises(RewardError, match=f"{len(BAD)} of {len(data)} items") as raised:
            strict(data)
        assert raised.value.rewards == rewards
        with pytest.raises(RewardError):
            asyncio.run(strict.ascore(data))
    told = [str(raised.value), *rewards.errors.values(), *map(str, caplog.messages)]
    assert not any(SECRET in text for text in told)


@pytest.mark.parametrize(("engine", "version"), ENGINES)
def test_an_over_long_item_fails_alone(
    engine: str, version: str, vocab_size: int, connect: Connect
) -> None:
    long = {"prompt": "x " * 40, "reference": "y " * 250, "output": "z " * 250}
    data = [*items(10), long, *items(10, seed=1)]
    limit = 300
    with running(
        engine, version, hash_score, vocab_size=vocab_size, max_length=limit, raw=True
    ) as server:
        limits = Limits(timeout=3.0, retry_delay=0.01, max_retries=6)
        client = connect(engine, server.address, on_error="none", limits=limits)
        rewards = client(data)
        assert rewards[:10] + rewards[11:] == expected(client, [*data[:10], *data[11:]])
        assert rewards[10] is None
        # LMDeploy does not tell its limit, and answers 500.
        told = "500" if engine == "lmdeploy" else "max_length="
        assert told in rewards.errors[10]


def test_ids_outside_the_vocabulary_are_not_sent(
    folder: Path, vocab_size: int, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    added = {"id": vocab_size + 7, "content": "zebra", "special": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({**added, **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with (
        running("sglang", "0.5.23", hash_score, vocab_size=vocab_size) as server,
        RewardModelClient(
            str(tmp_path), 1024, 256, server_address=server.address, on_error="none"
        ) as client,
    ):
        data = [*items(3), {"prompt": "a zebra", "reference": "b", "output": "c"}]
        rewards = client(data)
        assert server.is_alive
        assert [*rewards.errors] == [3]
        assert "outside the model's vocabulary" in rewards.errors[3]


# ---- what goes wrong on the way

PASSING = (
    Status(),
    UNAVAILABLE,
    busy(),
    Hang(),
    Reset(),
    Reset(unread=True),
    CutShort(),
    CutShort(promised=True),
    Shuffle(),
    Omit(),
)


@pytest.mark.parametrize(("engine", "version"), ENGINES)
def test_two_thousand_items_through_servers_that_fail(
    engine: str, version: str, vocab_size: int, connect: Connect
) -> None:
    """Shuffled answers can be told from right ones only where there is an index."""
    data = items(2000)
    passing = [a for a in PASSING if engine != "sglang" or not isinstance(a, Shuffle)]
    faults = [random_faults(seed, 0.3, passing) for seed in (1, 2)]
    limits = Limits(timeout=1.0, retry_delay=0.02, max_retries=12, request_items=32)
    started = time.monotonic()
    with (
        running(engine, version, hash_score, vocab_size=vocab_size, raw=True, fault=faults[0]) as a,
        running(engine, version, hash_score, vocab_size=vocab_size, raw=True, fault=faults[1]) as b,
    ):
        a.fault = lambda number, body: Die(0.5) if number == 20 else faults[0](number, body)
        client = connect(engine, a.address, b.address, limits=limits)
        assert client(data) == expected(client, data)
    assert time.monotonic() - started < 60


def test_a_sequence_that_the_server_fails_at_fails_alone(
    folder: Path, vocab_size: int, connect: Connect
) -> None:
    poison = {"prompt": "poison", "reference": "a", "output": "b"}
    data = [*items(40), poison, *items(23, seed=1)]

    with running("lmdeploy", "0.18.0", hash_score, vocab_size=vocab_size) as server:
        client = connect(
            "lmdeploy",
            server.address,
            on_error="none",
            limits=Limits(timeout=3.0, retry_delay=0.01, max_retries=8),
        )
        (ids,) = client.template.encode([Candidate("poison", "a", "b")])
        server.fault = lambda number, body: Status() if ids in body["input"] else None
        rewards = client(data)
        good = [*data[:40], *data[41:]]
        assert rewards[:40] + rewards[41:] == expected(client, good)
        assert "500" in rewards.errors[40]


@pytest.mark.parametrize("as_null", [False, True])
def test_what_is_no_number_is_an_error(as_null: bool, vocab_size: int, connect: Connect) -> None:
    with running("lmdeploy", "0.18.0", hash_score, vocab_size=vocab_size) as server:
        client = connect("lmdeploy", server.address, on_error="none")
        client(items(1, seed=5))
        server.fault = first(1000, NotANumber(2, as_null))
        rewards = client(items(5))
        assert [*rewards.errors] == [2]
        assert "no finite number" in rewards.errors[2]


def test_the_work_is_shared_and_goes_on_without_a_server_that_dies(
    vocab_size: int, connect: Connect
) -> None:
    data = items(400)
    score = slow(hash_score, 0.001)
    with (
        running("vllm", "0.32.0", score, vocab_size=vocab_size) as a,
        running("vllm", "0.32.0", score, vocab_size=vocab_size) as b,
    ):
        client = connect("vllm", f"{a.address},http://{b.address}/"[: -len("/")])
        assert client(data) == expected(client, data)
        assert min(a.items_answered, b.items_answered) > 100
        b.fault = at([len(b.requests) + 2], Die())
        assert client(data) == expected(client, data)
        a.die()
        with pytest.raises(RewardError, match="no connection"):
            client(data[:3])
        a.come_back()
        assert client(data) == expected(client, data)


def test_a_server_that_comes_back_as_another_is_looked_at_again(
    vocab_size: int, connect: Connect
) -> None:
    data = items(5)
    with running("vllm", "0.10.0", hash_score, vocab_size=vocab_size) as server:
        client = connect("vllm", server.address)
        client(data)
        port = server.port
    with pytest.raises(RewardError, match="no connection"):
        client(data)
    with (
        running("vllm", "0.10.2", hash_score, vocab_size=vocab_size, port=port),
        pytest.raises(ServerError, match="softmax"),
    ):
        client(data)


def test_nobody_there_is_said_in_bounded_time(connect: Connect) -> None:
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"no server answers, after 3 retries.*no connection"):
        connect("vllm", "127.0.0.1:9")(items(50))
    assert time.monotonic() - started < 10


# ---- speed


def test_calls_made_at_the_same_time_share_requests_and_connections(
    vocab_size: int, connect: Connect
) -> None:
    data = items(300)
    with running("sglang", "0.5.23", hash_score, vocab_size=vocab_size) as server:
        client = connect("sglang", server.address, limits=Limits())

        async def one_by_one() -> list[Any]:
            return [r for rs in await asyncio.gather(*map(client.ascore, data)) for r in rs]

        before = len(server.requests)
        assert asyncio.run(one_by_one()) == expected(client, data)
        assert len(server.requests) - before < 100
        found: dict[int, Any] = {}

        def ask(part: int) -> None:
            found[part] = client(data[part * 100 : part * 100 + 100])

        threads = [threading.Thread(target=ask, args=[part]) for part in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [r for part in range(3) for r in found[part]] == expected(client, data)
        assert server.connections <= 12
        assert server.in_flight_max <= Limits().in_flight


def test_a_cancelled_call_leaves_the_client_usable(vocab_size: int, connect: Connect) -> None:
    with running("vllm", "0.32.0", slow(hash_score, 0.02), vocab_size=vocab_size) as server:
        client = connect("vllm", server.address)

        async def too_slow() -> None:
            await asyncio.wait_for(client.ascore(items(200)), 0.3)

        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(too_slow())
        stream = client.stream(items(300, seed=2))
        assert next(stream).reward is not None
        stream.close()
        assert client(items(3)) == expected(client, items(3))


# ---- processes


def test_a_client_can_be_pickled_closed_and_forked(
    vocab_size: int, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # as xtuner does
    data = items(50)
    with running("vllm", "0.32.0", hash_score, vocab_size=vocab_size) as server:
        client = connect("vllm", server.address)
        rewards = client(data)
        with pickle.loads(pickle.dumps(client)) as copy:
            assert copy(data) == rewards
        client.close()
        assert client(data) == rewards
        read, write = os.pipe()
        if not (child := os.fork()):
            try:
                os.write(write, json.dumps(client(data)).encode())
            finally:
                os._exit(0)
        ready, _, _ = select.select([read], [], [], 30)
        if not ready:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert ready, "the child hangs"
        assert json.loads(os.read(read, 10000)) == rewards


LIGHT = """
import logging, sys
from polar_xtuner.client import RewardModelClient
client = RewardModelClient({folder!r}, 1024, 256, server_type="vllm", server_address={address!r})
print(client({data!r}))
heavy = {{"torch", "transformers", "xtuner", "mmengine", "deepspeed"}} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_client_needs_no_torch_and_ends_quietly(folder: Path, vocab_size: int) -> None:
    with running("vllm", "0.32.0", hash_score, vocab_size=vocab_size) as server:
        code = LIGHT.format(folder=str(folder), address=server.address, data=items(2))
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
        )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 2
    assert "destroyed" not in done.stderr and "Unclosed" not in done.stderr


def test_proxies_are_left_aside_only_if_asked(
    vocab_size: int, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with (
        running("vllm", "0.32.0", hash_score, vocab_size=vocab_size) as server,
        pytest.raises(RewardError, match="no connection"),
    ):
        connect("vllm", server.address)(items(2))
        client = connect("vllm", server.address, bypass_proxy=True)
        assert client(items(2)) == expected(client, items(2))


# ---- settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server_type": "triton"}, "server_type must be one of sglang, vllm, lmdeploy"),
        ({"response_cut_side": "left"}, "response_cut_side must be"),
        ({"server_address": ""}, "server_address must be"),
        ({"on_error": "ignore"}, "on_error must be"),
        ({"normalize": True}, "has no polar_calibration"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        RewardModelClient(str(folder), **options)
    with pytest.raises(ValueError, match="in_flight must be at least 1"):
        Limits(in_flight=0)


def test_rewards_can_be_normalized(folder: Path, vocab_size: int, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config[CALIBRATION] = {"mean": -3.0, "std": 2.0, "temperature": 1.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (
        running("vllm", "0.32.0", hash_score, vocab_size=vocab_size) as server,
        RewardModelClient(
            str(tmp_path), 1024, 256, "right", "vllm", server.address, normalize=True
        ) as client,
    ):
        raw = torch.tensor(expected(client, items(9)), dtype=torch.float64)
        assert client(items(9)) == pytest.approx(torch.sigmoid((raw + 3) / 1.5).tolist())


# ---- as POLAR's own client


EXAMPLES = Path(__file__).parents[2] / "shared" / "polar_examples.json"


@pytest.mark.parametrize(("engine", "version"), [ENGINES[4], ENGINES[5], ENGINES[8]])
def test_published_examples_run_as_published(
    engine: str, version: str, folder: Path, vocab_size: int, connect: Connect
) -> None:
    if not EXAMPLES.is_file():
        pytest.skip("needs the published examples, which are not part of the repository")
    data = [
        {"prompt": e["prompt"], "reference": e["reference"], "output": output["output"]}
        for e in json.loads(EXAMPLES.read_text())["examples"]
        for output in e["outputs"]
    ]
    with running(engine, version, hash_score, vocab_size=vocab_size, raw=True) as server:
        client = connect(engine, server.address)
        encoded = client.encode(data)
        rewards = getattr(client, f"{engine}_request_reward")(encoded)
        assert rewards == client(data) == expected(client, data)
        one = client.encode(data[0])
        assert isinstance(one, Encoded)
        assert getattr(client, f"{engine}_request_reward")(one, max_retries=1) == rewards[:1]
        with pytest.raises(TypeError, match="takes what `encode` returned"):
            getattr(client, f"{engine}_request_reward")(["a text"])


def test_encoded_text_suits_the_transformers_route(folder: Path) -> None:
    """As POLAR's README: tokenizer and `AutoModel` with the checkpoint's own code."""
    client = RewardModelClient(str(folder), 1024, 256)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    data = items(6)
    encoded = client.encode(data)
    options = {"padding": True, "return_token_type_ids": False}
    batch = tokenizer(list(encoded), return_tensors="pt", **options)
    for one, ids, mask in zip(encoded, batch["input_ids"], batch["attention_mask"]):
        assert ids[mask.bool()].tolist() == one.ids
    with torch.no_grad():
        rewards = model(**batch)[0].squeeze(-1)
    assert rewards.tolist() == pytest.approx(expected(client, data, tiny_model(folder)), abs=1e-4)


def test_text_that_cannot_say_the_ids_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = RewardModelClient(str(folder), 1024, 256)
    hostile = {"prompt": f"<|reward|> {SECRET}", "reference": "<s>", "output": "</s>"}
    encoded = client.encode(hostile)
    assert isinstance(encoded, Encoded)
    assert encoded.ids == client.template.encode([Candidate(*hostile.values())])[0]
    assert "tokenizers need their `ids`" in caplog.text
    assert SECRET not in caplog.text
