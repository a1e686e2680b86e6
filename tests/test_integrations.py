"""POLAR in verl and TRL, called as they call it."""

from __future__ import annotations

import asyncio
import copy
import importlib
import importlib.util
import inspect
import json
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_xtuner.integrations import settings as settings_module
from polar_xtuner.integrations import verl
from polar_xtuner.integrations.settings import Settings
from polar_xtuner.integrations.thinking import answer_of
from polar_xtuner.integrations.trl import PolarReward
from polar_xtuner.records import text_of
from polar_xtuner.rewards import (
    RewardError,
    Rewards,
    Scored,
    as_items,
    candidate_of,
    check_on_error,
    gather,
)


class FakeClient:
    """`RewardModelClient` with a reward that tells all of an item apart, and no server."""

    made: ClassVar[list[FakeClient]] = []

    def __init__(self, path: str, on_error: str = "raise", **options: Any) -> None:
        check_on_error(on_error)
        self.path, self.on_error, self.options = path, on_error, options
        self.calls: list[int] = []
        self.made.append(self)

    def __call__(self, data: Any) -> Rewards:
        items = as_items(data)
        self.calls.append(len(items))
        return gather(map(self._score, items), self.on_error)

    async def ascore(self, data: Any) -> Rewards:
        await asyncio.sleep(0)
        return self(data)

    def _score(self, item: Any) -> Scored:
        candidate = candidate_of(item)
        if isinstance(candidate, Scored) or candidate.output == "unreachable":
            return Scored(None, "the server is gone")
        return Scored(reward(*candidate))


def reward(prompt: str, reference: str, output: str, wrapper: str = "sft") -> float:
    return len(prompt) + len(reference) / 100 + len(output) / 1e4 + (wrapper == "pretrain") / 1e6


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeClient]]:
    """The clients that were made, all fakes."""
    monkeypatch.setattr(settings_module, "RewardModelClient", FakeClient)
    monkeypatch.setattr(settings_module, "_clients", {})
    for name in settings_module._READERS:
        monkeypatch.delenv(settings_module.variable(name), raising=False)
    FakeClient.made.clear()
    yield FakeClient.made


def messages(role: str, *contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for content in contents]


def row(prompt: str, reference: str, source: str = "polar", **info: Any) -> dict[str, Any]:
    """A row of POLAR's own recipe, as verl's dataset gives it."""
    asked = messages("user", prompt)
    return {
        "data_source": source,
        "prompt": asked,
        "ability": "general",
        "reward_model": {"style": "polar", "ground_truth": messages("assistant", reference)},
        "extra_info": {"prompt": asked, **info},
    }


ROWS = [row("What is 6 x 7?", "42"), row("Capital of China?", "Beijing."), row("你好", "你好!")]
OUTPUTS = ["It is 42.", "Shanghai, I think.", "您好"]
EXPECTED = [
    reward("What is 6 x 7?", "42", "It is 42."),
    reward("Capital of China?", "Beijing.", "Shanghai, I think."),
    reward("你好", "你好!", "您好"),
]


# --- verl, as verl calls -------------------------------------------------------------------------


def verl_0_5(rows: list[dict[str, Any]], outputs: list[str], **reward_kwargs: Any) -> list[float]:
    """What `reward_manager=batch` of verl 0.5.0 does with a custom reward function.

    verl/trainer/ppo/reward.py loads the file by its path, as a module of another name;
    verl/workers/reward_manager/batch.py calls with keywords, arrays of objects among them, and
    takes for each row a number, or a dict whose names must be those of all rows.
    """
    spec = importlib.util.spec_from_file_location("custom_module", str(verl.__file__))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_module"] = module
    spec.loader.exec_module(module)
    compute_score = partial(called_with, module.compute_score_batch, reward_kwargs)

    batch = {name: objects([r.get(name) for r in rows]) for name in rows[0]}
    scores = compute_score(
        data_sources=batch["data_source"],
        solution_strs=outputs,
        ground_truths=[r.get("ground_truth") for r in batch["reward_model"]],
        extra_infos=batch.get("extra_info", [None] * len(rows)),
    )
    rewards = np.zeros(len(rows), np.float32)
    extra: dict[str, list[Any]] = {}
    for i in range(len(rows)):
        if isinstance(scores[i], dict):
            for name, value in scores[i].items():
                extra.setdefault(name, []).append(value)
        rewards[i] = scores[i]["score"] if isinstance(scores[i], dict) else scores[i]
    assert all(len(values) == len(rows) for values in extra.values())
    return rewards.tolist()


def verl_main(
    rows: list[dict[str, Any]], outputs: list[str], router: bool = False, **reward_kwargs: Any
) -> list[float]:
    """What the reward loop of verl 0.9.1 does with `custom_reward_function.path=pkg://...`.

    verl/experimental/reward_loop/reward_manager/naive.py asks `inspect` whether the function is
    async, adds to extra_info, and calls with keywords, every row in a task of its own.
    """
    raw = importlib.import_module("polar_xtuner.integrations.verl").compute_score
    assert inspect.iscoroutinefunction(raw)

    async def compute_score(**arguments: Any) -> Any:
        return await raw(**{**arguments, **reward_kwargs})

    async def one(number: int) -> Any:
        info = rows[number].get("extra_info", {})
        info.update(num_turns=2, rollout_reward_scores={})
        routed = {"reward_router_address": "10.0.0.1:1", "reward_model_tokenizer": object()}
        result = await compute_score(
            data_source=rows[number]["data_source"],
            solution_str=outputs[number],
            ground_truth=rows[number]["reward_model"]["ground_truth"],
            extra_info=info,
            **(routed if router else {}),
        )
        extra = dict(result) if isinstance(result, dict) else {"acc": result}
        return (result["score"] if isinstance(result, dict) else result), extra

    async def all_of_them() -> Any:
        return await asyncio.gather(*(one(i) for i in range(len(rows))))

    results = asyncio.run(all_of_them())
    names = list(results[0][1])
    assert all([extra[name] for name in names] for _, extra in results)  # as verl collects them
    return np.asarray([score for score, _ in results], np.float32).tolist()


def called_with(function: Callable[..., Any], fixed: dict[str, Any], *args: Any, **kw: Any) -> Any:
    return function(*args, **{**kw, **fixed})


def objects(values: list[Any]) -> Any:
    return np.fromiter(values, dtype=object, count=len(values))


BOTH = pytest.mark.parametrize("call", [verl_0_5, verl_main])


@BOTH
def test_verl_gets_the_reward_of_every_row_in_order(call: Any, made: list[FakeClient]) -> None:
    assert call(copy.deepcopy(ROWS), OUTPUTS, model="m") == pytest.approx(EXPECTED)
    [client] = made
    assert client.path == "m"
    assert sum(client.calls) == 3


@BOTH
def test_verl_gets_one_number_a_row_whatever_it_holds(call: Any, made: list[FakeClient]) -> None:
    rows = [row(str(n), "r" * n, index=n, split="test") for n in range(1, 9)]
    outputs = ["o" * n for n in range(1, 9)]
    assert len(call(rows, outputs, model="m")) == 8
    rows = [{**r, "extra_info": dict(r["extra_info"], wrapper="pretrain")} for r in rows]
    expected = [reward(str(n), "r" * n, "o" * n, "pretrain") for n in range(1, 9)]
    assert call(rows, outputs, model="m") == pytest.approx(expected, abs=1e-7)


def test_message_lists_may_be_arrays_as_pandas_reads_them(made: list[FakeClient]) -> None:
    rows = copy.deepcopy(ROWS)
    for one in rows:
        one["extra_info"]["prompt"] = objects(one["extra_info"]["prompt"])
        one["reward_model"]["ground_truth"] = objects(one["reward_model"]["ground_truth"])
    assert verl_0_5(rows, OUTPUTS, model="m") == pytest.approx(EXPECTED)


def test_a_reference_may_be_text(made: list[FakeClient]) -> None:
    rows = copy.deepcopy(ROWS)
    for one in rows:
        one["reward_model"]["ground_truth"] = one["reward_model"]["ground_truth"][0]["content"]
    assert verl_main(rows, OUTPUTS, router=True, model="m") == pytest.approx(EXPECTED)


@BOTH
@pytest.mark.parametrize(
    "lacking", ["extra_info", "extra_info.prompt", "reward_model.ground_truth"]
)
def test_a_row_without_prompt_or_reference_is_an_error_that_says_how_to_prepare_data(
    lacking: str, call: Any, made: list[FakeClient]
) -> None:
    rows = copy.deepcopy(ROWS)
    if lacking == "extra_info":
        for one in rows:
            del one["extra_info"]
    elif lacking == "extra_info.prompt":
        rows[1]["extra_info"] = {"split": "train", "index": 1}
    else:
        rows[1]["reward_model"]["ground_truth"] = None
    field = "extra_info.prompt" if lacking.startswith("extra_info") else lacking
    with pytest.raises(ValueError, match=rf"{field} is missing.*convert_data.py --to verl-parquet"):
        call(rows, OUTPUTS, model="m", on_error=-1)


def by_length(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any
) -> dict[str, Any]:
    """A rule that answers as verl's own may: with more than a score."""
    assert data_source == "math" and "prompt" in extra_info
    return {"score": -float(len(solution_str)), "acc": 0, "why": ground_truth}


@BOTH
@pytest.mark.parametrize("as_text", [False, True])
def test_rows_with_a_rule_do_not_change_how_others_are_scored(
    as_text: bool, call: Any, made: list[FakeClient]
) -> None:
    rows = [*copy.deepcopy(ROWS[:2]), row("x", "1", "math"), copy.deepcopy(ROWS[2])]
    outputs = [*OUTPUTS[:2], "<think>why</think> 4", OUTPUTS[2]]
    rules = {"math": f"{__name__}:by_length" if as_text else by_length}
    scores = call(rows, outputs, model="m", rules=rules)
    assert scores == pytest.approx([*EXPECTED[:2], -len(outputs[2]), EXPECTED[2]])
    assert sum(made[0].calls) == 3


def test_a_batch_of_rules_alone_asks_no_server(made: list[FakeClient]) -> None:
    rows = [row("x", "1", "math")] * 2
    assert verl_0_5(rows, ["a", "bc"], model="m", rules={"math": by_length}) == [-1, -2]
    assert not made


@BOTH
def test_an_output_without_a_reward_stops_the_run(call: Any, made: list[FakeClient]) -> None:
    with pytest.raises(RewardError, match="the server is gone"):
        call(copy.deepcopy(ROWS), ["a", "unreachable", "b"], model="m")


@BOTH
def test_an_output_without_a_reward_gets_the_number_that_is_set(
    call: Any, made: list[FakeClient], caplog: pytest.LogCaptureFixture
) -> None:
    outputs = [OUTPUTS[0], "unreachable", OUTPUTS[2]]
    scores = call(copy.deepcopy(ROWS), outputs, model="m", on_error=-7.5)
    assert scores == pytest.approx([EXPECTED[0], -7.5, EXPECTED[2]])
    assert "the server is gone" in caplog.text
    assert OUTPUTS[0] not in caplog.text


@BOTH
def test_verl_cannot_do_without_a_number(call: Any, made: list[FakeClient]) -> None:
    with pytest.raises(ValueError, match="needs a number for every row"):
        call(copy.deepcopy(ROWS), OUTPUTS, model="m", on_error="none")


@BOTH
def test_thinking_is_no_part_of_what_is_scored(call: Any, made: list[FakeClient]) -> None:
    outputs = [f"<think>hm</think>\n\n{OUTPUTS[0]}", f"hm</think>{OUTPUTS[1]}", "<think>hm"]
    scores = call(copy.deepcopy(ROWS), outputs, model="m")
    assert scores == pytest.approx([*EXPECTED[:2], reward("你好", "你好!", "")])
    kept = call(copy.deepcopy(ROWS), outputs, model="m", thinking="keep")
    assert kept[2] == pytest.approx(reward("你好", "你好!", "<think>hm"))


# --- settings ------------------------------------------------------------------------------------


def test_settings_come_from_keywords_and_then_from_the_environment(
    made: list[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {
        "POLAR_MODEL": "env",
        "POLAR_SERVER_TYPE": "vllm",
        "POLAR_SERVER_ADDRESS": "a:1,b:2",
        "POLAR_MAX_LENGTH": "2048",
        "POLAR_MAX_RESPONSE_LENGTH": "512",
        "POLAR_NORMALIZE": "true",
        "POLAR_THINKING": "opened",
        "POLAR_ON_ERROR": "-3",
        "POLAR_RULES": json.dumps({"math": f"{__name__}:by_length"}),
        "POLAR_DTYPE": "bfloat16",
        "POLAR_VERIFY": "false",
        "POLAR_API_KEY": "secret",
        "POLAR_SERVED_MODEL": "polar",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    read = Settings.read({"model": "keyword", "max_length": 4096, "server_type": None})
    assert read == Settings(
        *("keyword", "vllm", "a:1,b:2", 4096, 512, True, "opened", -3.0, {"math": by_length}),
        *("bfloat16", False, "secret", "polar"),
    )
    assert "secret" not in repr(read)
    scores = verl_0_5([*copy.deepcopy(ROWS[:1]), row("x", "1", "math")], ["hm", "four"])
    assert scores == pytest.approx([reward("What is 6 x 7?", "42", ""), -4])
    assert made[0].path == "env"
    assert made[0].options["server_address"] == "a:1,b:2"
    assert made[0].options["max_length"] == 2048
    how = {"dtype": "bfloat16", "verify": False, "api_key": "secret", "model": "polar"}
    assert how.items() <= made[0].options.items()


def test_addresses_may_be_a_list(made: list[FakeClient]) -> None:
    assert (
        Settings.read({"model": "m", "server_address": ["a:1", "b:2"]}).server_address == "a:1,b:2"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "POLAR_MODEL"),
        ({"model": "m", "modle": 1}, "no such setting: modle"),
        ({"model": "m", "thinking": "yes"}, "thinking must be one of"),
        ({"model": "m", "max_length": "long"}, "max_length: "),
        ({"model": "m", "normalize": "maybe"}, "normalize: must be true or false"),
        ({"model": "m", "on_error": "ignore"}, "on_error: "),
        ({"model": "m", "on_error": float("nan")}, "on_error: must be a finite number"),
        ({"model": "m", "rules": {"math": "no_such_module:f"}}, "rules: 'no_such_module:f'"),
        ({"model": "m", "rules": {"math": "json"}}, "rules: 'json'"),
        ({"model": "m", "rules": "[1]"}, "rules: must be"),
    ],
)
def test_a_wrong_setting_is_named(
    given: dict[str, Any], message: str, made: list[FakeClient]
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Settings.read(given)


def test_a_process_has_one_client_for_equal_settings(made: list[FakeClient]) -> None:
    ready = threading.Barrier(8)

    def ask(number: int) -> None:
        ready.wait()
        call = verl_main if number % 2 else verl.compute_score_batch
        if call is verl_main:
            verl_main(copy.deepcopy(ROWS), OUTPUTS, model="m")
        else:
            rows = copy.deepcopy(ROWS)
            verl.compute_score_batch(
                [r["data_source"] for r in rows],
                OUTPUTS,
                [r["reward_model"]["ground_truth"] for r in rows],
                [r["extra_info"] for r in rows],
                model="m",
                thinking="keep",
            )

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verl_0_5(copy.deepcopy(ROWS), OUTPUTS, model="m", on_error=0)  # a module of another name
    assert len(made) == 1
    assert sum(made[0].calls) == 27
    verl_main(copy.deepcopy(ROWS), OUTPUTS, model="m", max_length=1024, max_response_length=100)
    assert len(made) == 2


# --- thinking ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "removed", "opened"),
    [
        ("42", "42", ""),
        (" 42\n", " 42\n", ""),
        ("", "", ""),
        ("<think>a</think>42", "42", "42"),
        ("<think>\na\n</think>\n\n42\n", "42", "42"),
        ("a</think>42", "42", "42"),
        ("<think>a", "", ""),
        ("42<think>a", "42", ""),
        ("<think>a</think>4<think>b</think>2", "42", "42"),
        ("a</think>4<think>b</think>2", "42", "42"),
        ("<think>a</think>42<think>b", "42", "42"),
        ("<think>a<think>b</think>42", "42", "42"),
        ("<think></think>42", "42", "42"),
    ],
)
def test_thinking_is_removed(text: str, removed: str, opened: str) -> None:
    assert answer_of(text) == removed
    assert answer_of(text, "opened") == opened
    assert answer_of(text, "keep") == text


WORDS = st.lists(st.sampled_from(["<think>", "</think>", "a", "b c", "\n", "<", "think>", "好"]))


@given(WORDS.map("".join))
def test_an_answer_holds_no_opened_thinking_and_only_text_of_the_output(text: str) -> None:
    answer = answer_of(text)
    if "<think>" not in text and "</think>" not in text:
        assert answer == text
        return
    rest = iter(text)
    assert all(char in rest for char in answer)
    assert answer_of("<think>" + text) == answer_of(text, "opened")


# --- TRL, as TRL calls ---------------------------------------------------------------------------


def grpo(function: Any, dataset: list[dict[str, Any]], completions: list[Any]) -> Any:
    """What GRPOTrainer of TRL 1.16 does with a function that is not async: `_calculate_rewards`."""
    names = [name for name in dataset[0] if name not in ("prompt", "completion", "completion_ids")]
    rewards = function(
        prompts=[r["prompt"] for r in dataset],
        completions=completions,
        completion_ids=[[1, 2, 3] for _ in dataset],
        **{name: [r[name] for r in dataset] for name in names},
        trainer_state=object(),
        log_extra=lambda column, values: None,
        log_metric=lambda name, value: None,
    )
    rewards = [float("nan") if r is None else r for r in rewards]
    assert len(rewards) == len(dataset)
    return np.asarray(rewards, np.float32).tolist()


def test_trl_gets_rewards_of_text_and_of_messages(made: list[FakeClient]) -> None:
    function = PolarReward("m", server_type="vllm", api_key="secret", served_model="polar")
    assert function.__name__ == "polar_reward"
    assert not inspect.iscoroutinefunction(function.__call__)
    plain = [{"prompt": "Capital of China?", "reference": "Beijing.", "source": "s"}] * 2
    expected = [reward("Capital of China?", "Beijing.", text) for text in ("Beijing.", "")]
    assert grpo(function, plain, ["Beijing.", "<think>it"]) == pytest.approx(expected)
    chat = [
        {
            "prompt": messages("user", "Capital of China?"),
            "reference": messages("assistant", "Beijing."),
        }
    ] * 2
    completions = [
        messages("assistant", text) for text in ("<think></think>Beijing.", "it</think>")
    ]
    assert grpo(function, chat, completions) == pytest.approx(expected)
    assert len(made) == 1
    assert made[0].options["server_type"] == "vllm"
    assert made[0].options["api_key"] == "secret"
    assert made[0].options["model"] == "polar"


def test_trl_passes_the_wrapper_of_a_row(made: list[FakeClient]) -> None:
    rows = [{"prompt": "p", "reference": "r", "wrapper": wrapper} for wrapper in ("pretrain", None)]
    expected = [reward("p", "r", "o", "pretrain"), reward("p", "r", "o")]
    assert grpo(PolarReward("m"), rows, ["o", "o"]) == pytest.approx(expected, abs=1e-7)


def test_a_dataset_without_references_is_an_error_that_names_the_column(
    made: list[FakeClient],
) -> None:
    with pytest.raises(ValueError, match=r"no column `reference`.*'answer'"):
        grpo(PolarReward("m"), [{"prompt": "p", "answer": "a"}], ["o"])


def test_trl_leaves_out_completions_without_a_reward_if_told_so(made: list[FakeClient]) -> None:
    rows = [{"prompt": "p", "reference": "r"}] * 2
    with pytest.raises(RewardError):
        grpo(PolarReward("m"), rows, ["o", "unreachable"])
    rewards = grpo(PolarReward("m", on_error="none"), rows, ["o", "unreachable"])
    assert rewards == pytest.approx([reward("p", "r", "o"), float("nan")], nan_ok=True)
    with pytest.raises(ValueError, match="on_error"):
        PolarReward("m", on_error="-1")


def test_a_reward_function_can_be_copied_and_pickled(made: list[FakeClient]) -> None:
    function = PolarReward("m", name="mine")
    rows = [{"prompt": "p", "reference": "r"}]
    for twin in (copy.deepcopy(function), pickle.loads(pickle.dumps(function))):
        assert twin.__name__ == "mine"
        assert grpo(twin, rows, ["o"]) == pytest.approx([reward("p", "r", "o")])
    assert len(made) == 1


# --- with the real client ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def protocol_servers() -> ModuleType:
    return pytest.importorskip("protocol_servers")


@pytest.mark.parametrize("engine", [("vllm", "0.32.0"), ("sglang", "0.5.23")])
def test_all_routes_give_the_clients_rewards_and_share_its_requests(
    engine: tuple[str, str],
    small: Path,
    protocol_servers: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from polar_xtuner.client import RewardModelClient

    monkeypatch.setattr(settings_module, "_clients", {})
    lines = (small / "train.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    fields = ("prompt", "reference", "chosen")
    data = [{f: text_of(json.loads(line)[f]) for f in fields} for line in lines]
    rows = [row(d["prompt"], d["reference"], index=n) for n, d in enumerate(data)]
    outputs = [d["chosen"] for d in data]
    vocab_size = json.loads((small / "base" / "config.json").read_text())["vocab_size"]
    score = protocol_servers.hash_score
    with protocol_servers.running(*engine, score, vocab_size=vocab_size) as server:
        where = {"server_type": engine[0], "server_address": server.address}
        lengths = {"max_length": 512, "max_response_length": 128}
        with RewardModelClient(str(small / "base"), **where, **lengths) as client:
            asked = [
                {"prompt": d["prompt"], "reference": d["reference"], "output": o}
                for d, o in zip(data, outputs)
            ]
            expected = client(asked)
        options = {"model": str(small / "base"), **where, **lengths}
        assert verl_0_5(rows, outputs, **options) == pytest.approx(expected)
        before = server.requests_received
        assert verl_main(rows, outputs, **options) == pytest.approx(expected)
        assert server.requests_received - before <= 20
        dataset = [{"prompt": d["prompt"], "reference": d["reference"]} for d in data]
        function = PolarReward(str(small / "base"), **where, **lengths)
        assert grpo(function, dataset, outputs) == pytest.approx(expected)
        [shared] = settings_module._clients.values()
        shared.close()
