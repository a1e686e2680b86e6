"""The stand-ins for vLLM, SGLang and LMDeploy behave as the engines were measured to."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import math
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from commands import ROOT
from protocol_servers import (
    ENGINES,
    UNAVAILABLE,
    Action,
    CutShort,
    Die,
    ErrorWithStatus200,
    Hang,
    NotANumber,
    Omit,
    Reset,
    Server,
    Shuffle,
    Status,
    at,
    busy,
    cut_last,
    drop_bos,
    either,
    every,
    first,
    hash_score,
    random_faults,
    running,
    slow,
    tiny_model,
)
from tokenizers import Tokenizer

from polar_xtuner.modeling_internlm2 import InternLM2ForRewardModel
from polar_xtuner.scoring import PolarScorer
from polar_xtuner.template import Candidate

VOCABULARY = 1000
SEQUENCES = [[1, 5, 7, 9], [1, 5, 8], [1, 6]]
VLLM = [version for engine, version in ENGINES if engine == "vllm"]
SGLANG = [version for engine, version in ENGINES if engine == "sglang"]
LMDEPLOY = [version for engine, version in ENGINES if engine == "lmdeploy"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("protocol-server")]


def serve(engine: str, version: str, score: Any = hash_score, **options: Any) -> Any:
    return running(engine, version, score, **{"vocab_size": VOCABULARY, **options})


def get(server: Server, path: str) -> tuple[int, Any]:
    return ask(server, "GET", path, None)


def post(server: Server, path: str, body: Any) -> tuple[int, Any]:
    return ask(server, "POST", path, body)


def ask(server: Server, method: str, path: str, body: Any) -> tuple[int, Any]:
    """Status, and the JSON or text of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    raw = None if body is None else json.dumps(body)
    try:
        connection.request(method, path, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(text) if is_json else text
    finally:
        connection.close()


def score_route(engine: str) -> str:
    return "/classify" if engine == "sglang" else "/pooling"


def score_body(engine: str, sequences: Any) -> dict[str, Any]:
    key = "input_ids" if engine == "sglang" else "input"
    return {key: sequences, "use_activation": False}


def rewards(server: Server, engine: str, sequences: Any, **fields: Any) -> Any:
    body = {**score_body(engine, sequences), **fields}
    status, answer = post(server, score_route(engine), body)
    if status != 200:
        return status
    if engine == "sglang":
        return [r["embedding"][0] for r in (answer if isinstance(answer, list) else [answer])]
    assert [r["index"] for r in answer["data"]] == [*range(len(answer["data"]))]
    return [r["data"][-1][0] if engine == "vllm" else r["data"] for r in answer["data"]]


def last(score: Any, sequences: list[list[int]]) -> list[float]:
    return [values[-1] for values in score(sequences)]


# --- formats


@pytest.mark.parametrize(("engine", "version"), ENGINES)
def test_every_server_answers_rewards_in_order(engine: str, version: str) -> None:
    with serve(engine, version, raw=True) as server:
        assert rewards(server, engine, SEQUENCES) == last(hash_score, SEQUENCES)
        assert rewards(server, engine, SEQUENCES[0]) == last(hash_score, SEQUENCES[:1])
        assert server.requests[0].body[next(iter(score_body(engine, [])))] == SEQUENCES
        assert (server.requests_answered, server.items_answered) == (2, 4)


@pytest.mark.parametrize(
    ("version", "asked", "raw", "is_sigmoid"),
    [
        ("0.8.5", None, False, False),
        ("0.10.0", True, False, False),
        ("0.10.2", None, False, True),
        ("0.10.2", False, False, True),  # the field is not known yet
        ("0.10.2", None, True, False),
        ("0.11.1", None, False, True),
        ("0.11.1", False, False, False),
        ("0.11.1", None, True, False),
        ("0.32.0", None, False, True),
        ("0.32.0", False, False, False),
        ("0.32.0", True, True, True),
    ],
)
def test_vllm_answers_a_sigmoid(
    version: str, asked: bool | None, raw: bool, is_sigmoid: bool
) -> None:
    def score(sequences: list[list[int]]) -> list[list[float]]:
        return [[0.0, 2.0757], [20.0]]

    with serve("vllm", version, score, raw=raw) as server:
        values = rewards(server, "vllm", SEQUENCES[:2], use_activation=asked)
    assert values == pytest.approx([0.8885, 1.0] if is_sigmoid else [2.0757, 20.0], abs=1e-4)
    assert (values[1] == 1.0) is is_sigmoid


def test_deprecated_fields_turn_the_sigmoid_of_vllm_0_11_1_on() -> None:
    with serve("vllm", "0.11.1") as server:
        values = rewards(server, "vllm", SEQUENCES, softmax=False)
        assert all(0 <= value <= 1 for value in values)
    with serve("vllm", "0.32.0") as server:
        values = rewards(server, "vllm", SEQUENCES, softmax=False)
        assert values == last(hash_score, SEQUENCES)


@pytest.mark.parametrize("version", VLLM)
@pytest.mark.parametrize("step", [False, True])
def test_vllm_answers_one_value_a_token_or_one_an_input(version: str, step: bool) -> None:
    with serve("vllm", version, raw=True, step=step) as server:
        body = {"input": SEQUENCES}
        _, floats = post(server, "/pooling", body)
        _, packed = post(server, "/pooling", {**body, "encoding_format": "base64"})
    for values, number, text in zip(hash_score(SEQUENCES), floats["data"], packed["data"]):
        expected = values[-1:] if step else values
        assert number["data"] == [[value] for value in expected]
        raw = base64.b64decode(text["data"])
        assert [*struct.unpack(f"<{len(expected)}f", raw)] == expected
    assert floats["usage"]["prompt_tokens"] == 9


def test_sglang_answers_lists_for_lists() -> None:
    with serve("sglang", "0.5.23") as server:
        for body, kind in [
            ({"input_ids": [[1, 2]]}, list),
            ({"input_ids": [1, 2]}, dict),
            ({"input_ids": [[1, 2], [1]]}, list),
        ]:
            status, answer = post(server, "/classify", body)
            assert (status, type(answer)) == (200, kind)
        _, answer = post(server, "/v1/classify", {"input": [1, 2]})
        assert answer["data"][0]["probs"] == [1.0]
        _, answer = post(server, "/v1/embeddings", {"input": [[1, 2]]})
        assert answer["data"][0]["embedding"] == last(hash_score, [[1, 2]])


def test_sglang_0_4_4_cannot_take_a_list_of_one(small: Path) -> None:
    with serve("sglang", "0.4.4.post1", tokenizer=small / "base") as server:
        assert post(server, "/classify", {"text": ["one"]})[0] == 500
        assert isinstance(post(server, "/classify", {"text": "one"})[1], dict)
        assert len(post(server, "/classify", {"text": ["one", "two"]})[1]) == 2
        with pytest.raises(ConnectionError):
            post(server, "/classify", {"input_ids": [[1, 2]]})
        with pytest.raises(ConnectionRefusedError):
            get(server, "/health")


@pytest.mark.parametrize(("engine", "version"), ENGINES)
def test_text_gets_one_bos(engine: str, version: str, small: Path) -> None:
    ids = Tokenizer.from_file(str(small / "base" / "tokenizer.json")).encode("<s>Anna").ids
    assert ids[:2] == [ids[1]] * 2
    key = "text" if engine == "sglang" else "input"
    with serve(engine, version, tokenizer=small / "base") as server:
        for text, expected in [
            ("Anna", ids[1:]),
            ("<s>Anna", ids[1:] if engine == "lmdeploy" else ids),
        ]:
            status, answer = post(server, score_route(engine), {key: text})
            info = answer["meta_info"] if engine == "sglang" else answer["usage"]
            assert (status, info["prompt_tokens"]) == (200, len(expected))
    with serve(engine, version) as server:
        assert post(server, score_route(engine), {key: "Anna"})[0] == 400


# --- limits, errors, deaths


@pytest.mark.parametrize(("engine", "version"), ENGINES)
def test_the_longest_input(engine: str, version: str) -> None:
    less = {"0.4.4.post1": 6, "0.5.23": 1}.get(version, 0)
    longest = [7] * (100 - less)
    with serve(engine, version, max_length=100, raw=True) as server:
        for sequences in (longest, [[1, 2], longest]):
            assert rewards(server, engine, sequences)[-1] == last(hash_score, [longest])[0]
        status, answer = post(
            server, score_route(engine), score_body(engine, [[1, 2], [*longest, 7]])
        )
        if engine == "lmdeploy":
            assert (status, answer) == (500, "Internal Server Error")
        else:
            flat = version in ("0.8.5", "0.10.0")
            assert status == 400 and (answer if flat else answer["error"])["message"]
        assert server.is_alive


@pytest.mark.parametrize(
    ("engine", "version", "ids", "dies"),
    [
        *(("vllm", version, [1, -1], version != "0.32.0") for version in VLLM),
        *(("vllm", version, [1, VOCABULARY], False) for version in VLLM),
        *(("sglang", version, ids, True) for version in SGLANG for ids in ([1, -1], [VOCABULARY])),
    ],
)
def test_ids_outside_the_vocabulary(engine: str, version: str, ids: list[int], dies: bool) -> None:
    with serve(engine, version) as server:
        if dies:
            with pytest.raises(ConnectionError):
                rewards(server, engine, ids)
            with pytest.raises(ConnectionRefusedError):
                rewards(server, engine, [1, 2])
        else:
            assert rewards(server, engine, ids) == 400
        assert (server.is_alive, server.deaths) == (not dies, int(dies))


@pytest.mark.parametrize(("engine", "version"), ENGINES)
def test_malformed_requests(engine: str, version: str) -> None:
    wanted = 422 if version in ("0.4.4.post1", "0.9.2") else 400
    with serve(engine, version) as server:
        for body in ([1], score_body(engine, [1.5]), score_body(engine, [[1], "a"])):
            assert post(server, score_route(engine), body)[0] == wanted
        assert post(server, "/v1/chat", {})[0] == 404
        assert server.is_alive


@pytest.mark.parametrize("version", VLLM)
def test_what_vllm_tells_of_itself(version: str) -> None:
    with serve("vllm", version, max_length=77, served_name="mine") as server:
        assert get(server, "/version") == (200, {"version": version})
        assert get(server, "/health")[0] == 200
        card = get(server, "/v1/models")[1]["data"][0]
        assert (card["id"], card["max_model_len"]) == ("mine", 77)
        assert rewards(server, "vllm", [1, 2], model="mine") != 404
        status, answer = post(server, "/pooling", {"input": [1, 2], "model": "other"})
        is_flat = version in ("0.8.5", "0.10.0")
        assert (status, answer.get("object")) == (404, "error" if is_flat else None)
        assert "other" in (answer if is_flat else answer["error"])["message"]


@pytest.mark.parametrize("version", SGLANG)
def test_what_sglang_tells_of_itself(version: str) -> None:
    with serve("sglang", version, max_length=77, warm_up=0.2) as server:
        is_old = version == "0.4.4.post1"
        assert get(server, "/health")[0] == (200 if is_old else 503)
        assert get(server, "/health_generate")[0] == 503
        assert get(server, "/get_model_info")[1]["is_generation"] is False
        info = get(server, "/get_server_info")[1]
        assert (info["version"], info["max_req_input_len"]) == (version, 71)
        assert get(server, "/version")[0] == 404
        card = get(server, "/v1/models")[1]["data"][0]
        assert card.get("max_model_len") == (None if is_old else 77)
        threading.Event().wait(0.3)
        assert get(server, "/health")[0] == 200


@pytest.mark.parametrize("version", LMDEPLOY)
def test_what_lmdeploy_tells_of_itself(version: str) -> None:
    with serve("lmdeploy", version) as server:
        assert get(server, "/version")[0] == 404
        card = get(server, "/v1/models")[1]["data"][0]
        assert (card["owned_by"], "max_model_len" in card) == ("lmdeploy", False)
        assert rewards(server, "lmdeploy", [1, 2], model="other") == last(hash_score, [[1, 2]])


# --- scores


def test_the_tiny_model_gives_the_rewards_of_the_scorer(small: Path, tmp_path: Path) -> None:
    model = InternLM2ForRewardModel.from_pretrained(str(small / "base"))
    torch.manual_seed(0)
    model.v_head.weight.data.normal_()
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((small / "base" / file).read_bytes())
    scorer = PolarScorer(str(tmp_path), device="cpu")
    candidates = [Candidate("Anna has 3 pens.", "5", answer) for answer in ("5", "6 pens", "")]
    sequences = scorer.template.encode(candidates)
    score = tiny_model(tmp_path)
    truth = scorer.score(candidates)
    assert len({*truth}) == 3
    assert last(score, sequences) == pytest.approx(truth, abs=1e-5)
    values = score(sequences)[0]
    assert len(values) == len(sequences[0])
    for end in (1, 4):  # causal: a position's value is that of the sequence that ends there
        assert values[end - 1] == pytest.approx(score([sequences[0][:end]])[0][-1], abs=1e-5)
    with serve("vllm", "0.32.0", score, vocab_size=scorer.model.config.vocab_size) as server:
        assert rewards(server, "vllm", sequences) == pytest.approx(truth, abs=1e-5)


def test_hashes_depend_on_every_id_and_its_place() -> None:
    ids = [*range(1, 40)]
    others = [[*ids[:i], 500, *ids[i + 1 :]] for i in range(39)] + [[2, 1, *ids[2:]]]
    values = last(hash_score, [ids, *others])
    assert len({*values}) == len(values)
    assert all(-12 <= value < 5 for value in values)


def test_a_slow_model_takes_its_time_for_every_sequence() -> None:
    began = time.monotonic()
    assert slow(hash_score, 0.02)(SEQUENCES) == hash_score(SEQUENCES)
    assert time.monotonic() - began >= 0.06


def test_broken_models_lose_an_id() -> None:
    for broken, seen in ((drop_bos, [5, 7, 9]), (cut_last, [1, 5, 7])):
        assert last(broken(hash_score), SEQUENCES[:1]) == last(hash_score, [seen])


# --- faults


@pytest.mark.parametrize(
    ("action", "status", "retry_after"),
    [(Status(), 500, None), (UNAVAILABLE, 503, None), (busy("1"), 429, "1")],
)
def test_status_faults(action: Action, status: int, retry_after: str | None) -> None:
    with serve("vllm", "0.32.0", fault=first(1, action)) as server:
        request = urllib.request.Request(server.url + "/pooling", b'{"input": [1, 2]}')
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        caught.value.close()
        assert (caught.value.code, caught.value.headers["Retry-After"]) == (status, retry_after)
        assert rewards(server, "vllm", SEQUENCES) == last(hash_score, SEQUENCES)
        assert (server.requests_received, server.requests_answered) == (2, 1)


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (Reset(), ConnectionError),
        (Reset(unread=True), ConnectionError),
        (Hang(), TimeoutError),
        (CutShort(), http.client.IncompleteRead),
        (CutShort(promised=True), json.JSONDecodeError),
        (Die(0.2), ConnectionError),
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_faults_that_spoil_the_transport(engine: str, action: Action, error: type) -> None:
    version = {"vllm": "0.32.0", "sglang": "0.5.23"}[engine]
    with serve(engine, version, fault=at([1], action)) as server:
        assert rewards(server, engine, SEQUENCES) == last(hash_score, SEQUENCES)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=0.5)
        long = [[7] * 2000] * 300 if action == Reset(unread=True) else SEQUENCES
        with pytest.raises(error):
            connection.request(
                "POST",
                score_route(engine),
                json.dumps(score_body(engine, long)),
                {"Content-Type": "application/json"},
            )
            json.loads(connection.getresponse().read())
        connection.close()
        if isinstance(action, Die):
            with pytest.raises(ConnectionRefusedError):
                rewards(server, engine, SEQUENCES)
            threading.Event().wait(0.4)
        assert rewards(server, engine, SEQUENCES) == last(hash_score, SEQUENCES)
        assert server.in_flight == 0
        assert server.actions == {type(action).__name__: 1}


@pytest.mark.parametrize(("engine", "version"), ENGINES)
def test_faults_that_spoil_results(engine: str, version: str) -> None:
    def data(action: Action, **fields: Any) -> Any:
        with serve(engine, version, fault=every(1, action), raw=True) as server:
            body = {**score_body(engine, SEQUENCES), **fields}
            _, answer = post(server, score_route(engine), body)
        return answer["data"] if engine != "sglang" else answer

    def value(result: dict[str, Any]) -> float:
        value = result["embedding"] if engine == "sglang" else result["data"]
        return value[-1] if engine == "sglang" else value[-1][0] if engine == "vllm" else value

    truth = last(hash_score, SEQUENCES)
    shuffled = data(Shuffle())
    assert [*map(value, shuffled)] == truth[::-1]
    if engine != "sglang":
        assert [result["index"] for result in shuffled] == [2, 1, 0]
    assert [*map(value, data(Omit(1)))] == [truth[0], truth[2]]
    bad = data(NotANumber(1))
    assert math.isnan(value(bad[1])) and value(bad[2]) == truth[2]
    assert value(data(NotANumber(1, as_null=True))[1]) is None
    if engine == "vllm":
        packed = base64.b64decode(data(NotANumber(1), encoding_format="base64")[1]["data"])
        assert math.isnan(struct.unpack("<f", packed[-4:])[0])


def test_an_error_may_come_with_status_200() -> None:
    with serve("vllm", "0.10.2", fault=first(1, ErrorWithStatus200())) as server:
        status, answer = post(server, "/pooling", {"input": [1, 2]})
        assert (status, answer["error"]["code"]) == (200, 400)


def test_faults_can_look_at_the_body() -> None:
    def fault(number: int, body: Any) -> Action | None:
        return UNAVAILABLE if len(body["input"]) > 2 else None

    with serve("vllm", "0.32.0", fault=either(fault, first(0, Hang()))) as server:
        assert rewards(server, "vllm", SEQUENCES) == 503
        assert rewards(server, "vllm", SEQUENCES[:2]) == last(hash_score, SEQUENCES[:2])


def test_random_faults_are_a_share_and_repeat() -> None:
    one, two = random_faults(3, 0.2), random_faults(3, 0.2)
    actions = [one(number, None) for number in range(2000)]
    assert actions == [two(number, {}) for number in range(2000)]
    assert actions != [random_faults(4, 0.2)(number, None) for number in range(2000)]
    assert 0.17 < sum(action is not None for action in actions) / 2000 < 0.23


# --- server


def test_a_server_dies_and_comes_back_on_its_port() -> None:
    with serve("vllm", "0.32.0") as server:
        for _ in range(3):
            assert rewards(server, "vllm", [1, 2]) == last(hash_score, [[1, 2]])
            server.die()
            assert not server.is_alive
            with pytest.raises(ConnectionRefusedError):
                rewards(server, "vllm", [1, 2])
            server.come_back()
        assert (server.deaths, server.requests_answered, server.connections) == (3, 3, 3)


def test_requests_in_flight_and_connections_are_counted() -> None:
    async def send(server: Server) -> None:
        async with aiohttp.ClientSession() as session:

            async def one(ids: list[int]) -> None:
                async with session.post(server.url + "/pooling", json={"input": ids}) as response:
                    assert (await response.json())["data"][0]["data"][-1]

            for _ in range(5):
                await one([1, 2])
            assert server.connections == 1
            gate.clear()
            await asyncio.gather(*(one([1, i]) for i in range(8)), open_gate(server))

    async def open_gate(server: Server) -> None:
        while server.in_flight < 8:
            await asyncio.sleep(0.01)
        gate.set()

    def score(sequences: list[list[int]]) -> list[list[float]]:
        assert gate.wait(30)
        return hash_score(sequences)

    gate = threading.Event()
    gate.set()
    with serve("vllm", "0.32.0", score) as server:
        asyncio.run(send(server))
        assert (server.in_flight_max, server.connections, server.in_flight) == (8, 8, 0)
        assert server.items_answered == 13


def test_a_server_closes_with_requests_in_flight() -> None:
    with serve("vllm", "0.32.0", fault=every(1, Hang())) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        connection.request("POST", "/pooling", b"{}", {"Content-Type": "application/json"})
        while not server.actions:
            threading.Event().wait(0.01)
    with pytest.raises(ConnectionError):
        connection.getresponse()
    connection.close()


def test_an_error_of_the_score_is_not_lost() -> None:
    def score(sequences: list[list[int]]) -> list[list[float]]:
        raise RuntimeError("no score")

    with pytest.raises(RuntimeError, match="no score"), serve("vllm", "0.32.0", score) as server:
        assert rewards(server, "vllm", [1, 2]) == 500


def test_a_server_runs_as_a_process() -> None:
    command = [sys.executable, str(ROOT / "tests" / "protocol_servers.py")]
    command += ["--engine", "sglang", "--version", "0.5.23"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(url + "/health") as response:
            assert response.status == 200
        process.terminate()
        assert process.wait(10) == 0
