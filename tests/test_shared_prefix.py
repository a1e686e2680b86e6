"""Sharing prefixes changes nothing: loss and gradients are those of separate sequences.

The truth here knows no groups, packs or weights: every candidate goes through the decoder by
itself, as one plain causal sequence (which test_modeling_internlm2.py compares with the published
code), and the loss is assembled pair by pair. All in float64.
"""

import json
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import pair_array
from torch.nn import functional as F

from polar_xtuner.cache import Group, lay_out
from polar_xtuner.collate import PackLayout, collate_pack
from polar_xtuner.dataset import PolarDataset
from polar_xtuner.modeling_internlm2 import (
    InternLM2Config,
    InternLM2ForRewardModel,
    InternLM2MLP,
)
from polar_xtuner.packing import plan_epoch
from polar_xtuner.reward_model import PolarRewardModel
from polar_xtuner.template import Candidate, PolarTemplate

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

VOCAB = 40
REWARD = VOCAB - 1


@dataclass
class PlainGroup:
    """Distinct sequences of one row, and its pairs (chosen, rejected, margin)."""

    sequences: list[list[int]]
    pairs: list[tuple[int, int, float]]

    def laid_out(self):
        tokens, pieces = lay_out(self.sequences)
        return Group(np.array(tokens), np.array(pieces), pair_array(self.pairs))


def reward_model(checkpointing=False, seed=0, vocab_size=VOCAB, heads=4, kv_heads=2):
    torch.manual_seed(seed)
    config = InternLM2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        bias=False,
    )
    llm = InternLM2ForRewardModel(config)
    for name, parameter in llm.named_parameters():
        parameter.data.normal_(std=0.25)
        if "norm" in name:
            parameter.data += 1
    model = PolarRewardModel(llm, use_activation_checkpointing=checkpointing)
    return model.double().train()


def random_pairs(rng, candidates):
    """Some of the ordered pairs, one may come twice, with margins."""
    every = [(c, r) for c in range(candidates) for r in range(candidates) if c != r]
    if not every:
        return []
    number = rng.integers(1, len(every) + 2)
    chosen = [every[i] for i in rng.integers(len(every), size=number)]
    return [(c, r, float(m)) for (c, r), m in zip(chosen, rng.normal(size=number), strict=True)]


def random_group(rng, most=6):
    """Candidates that branch anywhere: some stop where others go on, some differ in one id."""

    def ids(low, high):
        return rng.integers(1, REWARD, rng.integers(low, high)).tolist()

    contents = [ids(1, 12)]
    number = rng.integers(1, most + 1)
    while len(contents) < number:
        parent = contents[rng.integers(len(contents))]
        kept = parent[: rng.integers(1, len(parent) + 1)]
        longer = kept + ids(0, 6)
        if longer not in contents:
            contents.append(longer)
    rng.shuffle(contents)
    return PlainGroup([[*c, REWARD] for c in contents], random_pairs(rng, len(contents)))


PREFIX = [3, 1, 4, 1, 5, 9]

GROUPS = {
    "one candidate": PlainGroup([[*PREFIX, REWARD]], []),
    "a pair": PlainGroup([[*PREFIX, 2, 6, REWARD], [*PREFIX, 7, REWARD]], [(0, 1, 0.0)]),
    "one content is the beginning of another": PlainGroup(
        [[*PREFIX, 2, 6, REWARD], [*PREFIX, 2, REWARD], [*PREFIX, 2, 6, 5, REWARD]],
        [(0, 1, 0.5), (2, 0, 0.0), (1, 2, -1.0)],
    ),
    "suffixes of a single token": PlainGroup(
        [[*PREFIX, 2, 6, REWARD], [*PREFIX, REWARD]], [(1, 0, 0.0)]
    ),
    "the first suffix is a single token": PlainGroup(
        [[*PREFIX, REWARD], [*PREFIX, 2, 6, REWARD]], [(0, 1, 0.0)]
    ),
    "nothing in common but BOS": PlainGroup(
        [[3, 2, 6, REWARD], [3, 5, REWARD], [3, 7, 7, 7, REWARD]], [(0, 1, 0.0), (0, 2, 0.0)]
    ),
}


# ---- The truth


def separate_rewards(model, sequences):
    rewards = []
    for ids in sequences:
        layout = PackLayout.of([[len(ids) - 1, 1]])
        hidden = model.decoder(torch.tensor(ids), torch.arange(len(ids)), layout)
        rewards.append(model.v_head(hidden[-1]))
    return rewards


def separate_loss(model, groups):
    """The mean over all pairs of -log sigmoid(r_c - r_r - margin)."""
    losses = []
    for group in groups:
        rewards = separate_rewards(model, group.sequences)
        losses += [-F.logsigmoid(rewards[c] - rewards[r] - m) for c, r, m in group.pairs]
    return sum(losses) / len(losses)


def loss_and_gradients(model, compute_loss):
    model.zero_grad()
    loss = compute_loss()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


# ---- What is tested


def collated(groups, pair_weight):
    pack = {"groups": [g.laid_out() for g in groups], "pair_weight": pair_weight, "rows": []}
    return collate_pack([pack])["data"]


def pack_loss(model, groups):
    weight = 1 / sum(len(g.pairs) for g in groups)
    return model(collated(groups, weight), mode="loss")["loss"]


def assert_equal(ours, truth):
    assert ours[0] == pytest.approx(truth[0], rel=1e-12, abs=0)
    assert ours[1].keys() == truth[1].keys()
    for name, gradient in truth[1].items():
        error = ((ours[1][name] - gradient).norm() / gradient.norm()).item()
        assert error <= 1e-10, f"gradient of {name} is off by {error:.1e}"


def assert_as_separate(model, groups):
    ours = loss_and_gradients(model, lambda: pack_loss(model, groups))
    assert_equal(ours, loss_and_gradients(model, lambda: separate_loss(model, groups)))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_a_pack_has_the_loss_and_gradients_of_separate_sequences(seed, checkpointing):
    rng = np.random.default_rng(seed)
    groups = [random_group(rng) for _ in range(rng.integers(1, 6))]
    if not any(g.pairs for g in groups):
        groups.append(GROUPS["a pair"])
    assert_as_separate(reward_model(checkpointing, seed), groups)


@pytest.mark.parametrize("kind", [k for k in GROUPS if GROUPS[k].pairs])
def test_every_kind_of_group_has_the_gradients_of_separate_sequences(kind):
    model = reward_model()
    assert_as_separate(model, [GROUPS[kind]])
    # In every place of a pack.
    for place in range(3):
        neighbours = [GROUPS["a pair"], GROUPS["one candidate"]]
        assert_as_separate(model, [*neighbours[:place], GROUPS[kind], *neighbours[place:]])


def test_the_kinds_of_groups_are_what_they_say():
    lengths = {kind: lay_out(group.sequences)[1] for kind, group in GROUPS.items()}
    assert lengths == {
        "one candidate": [6, 1],
        "a pair": [6, 3, 2],
        "one content is the beginning of another": [7, 2, 1, 3],
        "suffixes of a single token": [6, 3, 1],
        "the first suffix is a single token": [6, 1, 3],
        "nothing in common but BOS": [1, 3, 2, 4],
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_computes_every_layer_twice(monkeypatch, checkpointing):
    calls = []
    forward = InternLM2MLP.forward
    monkeypatch.setattr(InternLM2MLP, "forward", lambda *x: calls.append(x) or forward(*x))
    pack_loss(reward_model(checkpointing), [GROUPS["a pair"]]).backward()
    assert len(calls) == (4 if checkpointing else 2)


# ---- Rows whose boundary tokenises differently


ROW = [
    Candidate("Add 2 and 3.\n", "The sum is 5.", answer)
    for answer in ("It is 5.", "\nIt is 5.", "\n\nIt is 6.", "", "It is 5", "It is 5.\n")
]


def assert_row_as_separate(tokenizer):
    template = PolarTemplate(tokenizer, max_length=200, max_response_length=40)
    sequences = template.encode(ROW)
    plain, plain_shared = (lay_out([sequences[0], sequences[i]])[1][0] for i in (1, 4))
    assert plain < plain_shared, "the line break of the prompt takes part in another token"
    number = {i: n for n, i in enumerate(sorted({i for ids in sequences for i in ids}))}
    sequences = [[number[i] for i in ids] for ids in sequences]
    group = PlainGroup(sequences, random_pairs(np.random.default_rng(0), len(sequences)))
    model = reward_model(vocab_size=len(number))
    assert_as_separate(model, [group])
    assert_as_separate(model, [group, PlainGroup(sequences[1:3], [(0, 1, 0.0)])])


def test_a_row_whose_boundary_tokenises_differently(internlm2_tokenizer):
    assert_row_as_separate(internlm2_tokenizer)


def test_a_row_whose_boundary_tokenises_differently_in_a_small_vocabulary(demo):
    tokenizer = demo.build_tokenizer()
    assert_row_as_separate(tokenizer)


# ---- No leakage


@pytest.mark.parametrize("seed", range(4))
def test_a_group_does_not_see_the_others_of_its_pack(seed):
    rng = np.random.default_rng(seed)
    model = reward_model(seed=seed)
    groups = [random_group(rng) for _ in range(4)]
    before = rewards_by_group(model, groups)
    for changed in range(len(groups)):
        others = list(groups)
        others[changed] = PlainGroup(
            [[(i % (REWARD - 1)) + 1 if i != REWARD else i for i in ids]
             for ids in groups[changed].sequences],
            [],
        )  # fmt: skip
        after = rewards_by_group(model, others)
        for number, (a, b) in enumerate(zip(before, after, strict=True)):
            difference = (a - b).abs()
            if number == changed:
                assert difference.min() > 1e-6
            else:
                assert difference.max() <= 1e-14 * a.abs().max()


@torch.no_grad()
def rewards_by_group(model, groups):
    return model(collated(groups, 0.0)).split([len(g.sequences) for g in groups])


@torch.no_grad()
def test_a_candidate_does_not_see_the_others_of_its_group():
    model = reward_model()
    group = PlainGroup([[*PREFIX, *suffix, REWARD] for suffix in ([2, 6], [7], [8, 8, 8])], [])
    before = model(collated([group], 0.0))
    for changed in range(3):
        sequences = [list(ids) for ids in group.sequences]
        sequences[changed][len(PREFIX)] = 20
        difference = (model(collated([PlainGroup(sequences, [])], 0.0)) - before).abs()
        assert difference[changed] > 1e-6
        assert difference[[i for i in range(3) if i != changed]].max() <= 1e-14


# ---- The loss belongs to the optimizer step


def spreads(groups):
    """Plans of one optimizer step: the same pairs in other packs, slots and ranks."""
    lengths = np.array([len(lay_out(g.sequences)[0]) for g in groups])
    pairs = np.array([len(g.pairs) for g in groups])
    for ranks, accumulation in ((1, 1), (1, 2), (2, 1), (3, 1), (2, 2), (1, 5), (2, 3)):
        per_step = ranks * accumulation
        cap = max(lengths.max(), lengths.sum() // max(1, per_step - 1))
        for seed, pairs_per_step in ((0, None), (1, pairs.sum())):
            plan = plan_epoch(
                lengths, pairs, lengths, int(lengths.sum() if per_step == 1 else cap),
                seed=seed, pairs_per_step=pairs_per_step, ranks=ranks, accumulation=accumulation,
            )  # fmt: skip
            assert plan.steps == 1
            packs = [plan.pack(i, rank) for i in range(plan.iterations) for rank in range(ranks)]
            assert sorted(s.group for p in packs for s in p.shares) == [*range(len(groups))]
            yield packs


def test_an_optimizer_step_has_one_gradient_however_its_pairs_are_spread():
    rng = np.random.default_rng(5)
    groups = []
    while len(groups) < 7:
        group = random_group(rng, most=4)
        groups += [group] if group.pairs else []
    model = reward_model()
    truth = loss_and_gradients(model, lambda: separate_loss(model, groups))
    numbers = set()
    for packs in spreads(groups):

        def loss_of_step(packs=packs):
            # What the engines do: average over the accumulation slots and over the ranks.
            losses = [
                model(collated([groups[s.group] for s in p.shares], p.pair_weight), mode="loss")[
                    "loss"
                ]
                for p in packs
            ]
            return sum(losses) / len(packs)

        assert_equal(loss_and_gradients(model, loss_of_step), truth)
        numbers.add(len(packs))
    assert numbers == {1, 2, 3, 4, 5, 6}


def test_an_optimizer_step_has_one_gradient_however_its_rows_are_grouped(demo_tokenizer, tmp_path):
    """Merged, pair by pair, and split at several caps, over ranks and accumulation slots."""
    rng = random.Random(3)
    answers = ["", "41", "42", "forty two", "I don't know", "12 + 30 = 42"]
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(24):
            better, worse, third = rng.sample(answers, 3)
            row = dict(
                prompt=f"What is {number % 2} + 41?",
                reference=answers[number % 3],
                chosen=[better, third] if number % 4 == 0 else better,
                rejected=worse,
                margin=rng.uniform(-1, 1),
            )
            file.write(json.dumps(row) + "\n")

    def packs_of(group_candidates, cap, ranks, accumulation):
        data = PolarDataset(
            demo_tokenizer,
            str(tmp_path / "rows.jsonl"),
            max_length=400,
            max_response_length=100,
            max_packed_length=cap,
            group_candidates=group_candidates,
            cache_dir=str(tmp_path / "cache"),
        )
        total = int(data.pair_counts.sum())
        plan = plan_epoch(
            data.lengths, data.pair_counts, data.attended, cap,
            pairs_per_step=total, seed=cap, ranks=ranks, accumulation=accumulation,
        )  # fmt: skip
        assert plan.steps == 1 and total == 30
        numbers.append(len(data.lengths))
        return [data[plan.pack(i, rank)] for i in range(plan.iterations) for rank in range(ranks)]

    numbers = []
    model = reward_model(vocab_size=len(demo_tokenizer))
    truth = None
    for shape in ((True, 400, 1, 1), (False, 2000, 1, 1), (True, 50, 11, 1), (False, 90, 4, 5)):
        packs = packs_of(*shape)

        def loss_of_step(packs=packs):
            losses = [model(collate_pack([p])["data"], mode="loss")["loss"] for p in packs]
            return sum(losses) / len(packs)

        found = loss_and_gradients(model, loss_of_step)
        if truth is None:
            truth = found
        assert_equal(found, truth)
    merged, apart, split, _ = numbers
    assert merged == 6 < split < apart == 30
