from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pair_array
from hypothesis import example, given
from hypothesis import strategies as st

from polar_xtuner.cache import Group, lay_out
from polar_xtuner.collate import PackLayout, collate_pack

REWARD = 9  # ends every sequence and stands nowhere else in it

sequences = st.lists(st.integers(0, 3), max_size=12).map(lambda ids: [1, *ids, REWARD])


@st.composite
def sequences_and_pairs(draw: st.DrawFn) -> tuple[list[list[int]], list[tuple[int, int, float]]]:
    """A group before it is laid out."""
    group = draw(st.lists(sequences, min_size=2, max_size=5, unique_by=tuple))
    numbers = st.integers(0, len(group) - 1)
    margins = st.floats(-10, 10)
    pairs = draw(st.lists(st.tuples(numbers, numbers, margins), min_size=1, max_size=4))
    return group, pairs


packs = st.lists(sequences_and_pairs(), min_size=1, max_size=4)

TWO_GROUPS = [
    ([[1, 2, 3, REWARD], [1, 2, REWARD]], [(0, 1, 0.5)]),
    ([[1, REWARD], [1, 0, REWARD], [1, 0, 0, REWARD]], [(2, 0, 0.0), (2, 1, -1.0)]),
]


def instance(content: Any, weight: float = 0.125) -> dict[str, Any]:
    """What a dataset gives for a pack."""
    groups = []
    for group, pairs in content:
        tokens, pieces = lay_out(group)
        groups.append(Group(np.array(tokens, "u4"), np.array(pieces, "i4"), pair_array(pairs)))
    rows = [f"train.jsonl:{i}" for i in range(len(groups))]
    ids = [int(i) for group in groups for i in group.tokens]
    return {"groups": groups, "pair_weight": weight, "rows": rows, "input_ids": ids, "labels": []}


def collated(content: Any) -> tuple[dict[str, Any], PackLayout]:
    data = collate_pack([instance(content)])["data"]
    return data, PackLayout(**data["layout"])


def candidates_of(content: Any) -> list[list[int]]:
    return [sequence for group, _ in content for sequence in group]


def gathered(layout: PackLayout, values_T: torch.Tensor) -> list[list[int]]:
    """What each candidate sees of `values_T`, one number a token."""
    keys_K = layout.gather(values_T[:, None, None])[:, 0, 0].tolist()
    cuts = layout.cu_seqlens_k.tolist()
    return [keys_K[start:end] for start, end in pairwise(cuts)]


@given(packs)
@example(TWO_GROUPS)
def test_the_keys_of_a_candidate_are_its_whole_sequence_and_nothing_else(content: Any) -> None:
    data, layout = collated(content)
    assert gathered(layout, data["input_ids_T"]) == candidates_of(content)


@given(packs)
@example(TWO_GROUPS)
def test_the_keys_of_a_candidate_stand_at_the_positions_of_a_separate_sequence(
    content: Any,
) -> None:
    data, layout = collated(content)
    lengths = [len(sequence) for sequence in candidates_of(content)]
    assert gathered(layout, data["position_ids_T"]) == [[*range(n)] for n in lengths]


@given(packs)
@example(TWO_GROUPS)
def test_the_queries_of_a_candidate_are_the_end_of_its_keys(content: Any) -> None:
    """So the causal mask, aligned bottom-right, gives each query the keys up to itself."""
    data, layout = collated(content)
    places = gathered(layout, torch.arange(len(data["input_ids_T"])))
    cuts = layout.cu_seqlens_q.tolist()
    for (start, end), keys in zip(pairwise(cuts), places, strict=True):
        assert keys[len(keys) - (end - start) :] == [*range(start, end)]
        assert end > start


@given(packs)
@example(TWO_GROUPS)
def test_the_queries_cover_the_pack_once_and_in_order(content: Any) -> None:
    data, layout = collated(content)
    cuts = layout.cu_seqlens_q.tolist()
    assert cuts[0] == 0
    assert cuts == sorted(cuts)
    assert cuts[-1] == len(data["input_ids_T"]) == sum(layout.piece_lengths)
    assert len(cuts) == len(layout.cu_seqlens_k) == len(candidates_of(content)) + 1


@given(packs)
def test_no_more_tokens_are_computed_than_the_groups_have_laid_out(content: Any) -> None:
    data, _ = collated(content)
    assert len(data["input_ids_T"]) == sum(len(lay_out(group)[0]) for group, _ in content)


@given(packs)
@example(TWO_GROUPS)
def test_the_fields_of_a_layout_say_the_same(content: Any) -> None:
    """The kernels read the tensors, the reference reads the lists."""
    _, layout = collated(content)
    assert layout.cu_seqlens_q.diff().tolist() == layout.query_lengths
    assert layout.cu_seqlens_k.diff().tolist() == layout.key_lengths
    assert layout.max_seqlen_q == max(layout.query_lengths)
    assert layout.max_seqlen_k == max(layout.key_lengths)
    assert layout.cu_seqlens_q.dtype == layout.cu_seqlens_k.dtype == torch.int32


@given(packs)
@example(TWO_GROUPS)
def test_reward_rows_hold_the_reward_token_of_each_candidate(content: Any) -> None:
    data, layout = collated(content)
    rows = data["reward_rows_C"]
    assert data["input_ids_T"][rows].tolist() == [REWARD] * len(candidates_of(content))
    assert [rows.tolist()] == [[end - 1 for end in layout.cu_seqlens_q.tolist()[1:]]]
    assert int((data["input_ids_T"] == REWARD).sum()) == len(rows)


@given(packs)
@example(TWO_GROUPS)
def test_pairs_name_the_sequences_they_were_made_of(content: Any) -> None:
    data, layout = collated(content)
    sequences = gathered(layout, data["input_ids_T"])
    pairs = [
        (sequences[c], sequences[r], margin)
        for c, r, margin in zip(
            data["chosen_P"].tolist(), data["rejected_P"].tolist(), data["margins_P"].tolist()
        )
    ]
    assert pairs == [(group[c], group[r], m) for group, of_group in content for c, r, m in of_group]


@given(packs, st.floats(0, 100))
def test_every_pair_weighs_what_the_plan_says(content: Any, weight: float) -> None:
    data = collate_pack([instance(content, weight)])["data"]
    assert data["pair_weights_P"].tolist() == [weight] * sum(len(pairs) for _, pairs in content)


def test_types_are_those_that_the_model_indexes_and_sums_with() -> None:
    data, _ = collated(TWO_GROUPS)
    types = {name: value.dtype for name, value in data.items() if name != "layout"}
    assert types == {
        **dict.fromkeys(
            ["input_ids_T", "position_ids_T", "reward_rows_C", "chosen_P", "rejected_P"],
            torch.int64,
        ),
        **dict.fromkeys(["pair_weights_P", "margins_P"], torch.float64),
    }


def test_a_pack_written_out() -> None:
    """Two groups by hand, to be read beside the module."""
    data, layout = collated(TWO_GROUPS)
    prefix, c0, c1 = [1, 2], [3, REWARD], [REWARD]
    other, d0, d1, d2 = [1], [REWARD], [0, REWARD], [0, 0, REWARD]
    assert data["input_ids_T"].tolist() == [*prefix, *c0, *c1, *other, *d0, *d1, *d2]
    assert data["position_ids_T"].tolist() == [0, 1, 2, 3, 2, 0, 1, 1, 2, 1, 2, 3]
    assert layout.piece_lengths == [2, 2, 1, 1, 1, 2, 3]
    assert layout.key_gather == [0, 1, 0, 2, 3, 4, 3, 5, 3, 6]
    assert layout.query_lengths == [4, 1, 2, 2, 3]
    assert layout.key_lengths == [4, 3, 2, 3, 4]
    assert data["reward_rows_C"].tolist() == [3, 4, 6, 8, 11]
    assert data["chosen_P"].tolist() == [0, 4, 4]
    assert data["rejected_P"].tolist() == [1, 2, 3]
    assert data["margins_P"].tolist() == [0.5, 0, -1]


def test_the_rows_and_pairs_of_the_pack_go_along() -> None:
    pack = instance(TWO_GROUPS)
    samples = collate_pack([pack])["data_samples"]
    assert samples["rows"] == pack["rows"]
    pairs = [pair for group in pack["groups"] for pair in group.pairs.tolist()]
    assert samples["pairs"].tolist() == pairs


def test_a_mapped_store_is_copied_and_stays_as_it_is() -> None:
    """The arrays of a store cannot be written; the tensors are the model's own."""
    pack = instance(TWO_GROUPS)
    for group in pack["groups"]:
        for array in group:
            array.flags.writeable = False
    data = collate_pack([pack])["data"]
    for name in ("input_ids_T", "margins_P", "chosen_P"):
        data[name] += 1
    assert [g.tokens.tolist() for g in pack["groups"]] == [
        lay_out(group)[0] for group, _ in TWO_GROUPS
    ]


@pytest.mark.parametrize("count", [0, 2, 3])
def test_more_or_fewer_than_one_pack_is_an_error_that_names_the_setting(count: int) -> None:
    with pytest.raises(ValueError, match=rf"got {count}: .*batch_size=1"):
        collate_pack([instance(TWO_GROUPS)] * count)


def test_a_layout_moves_only_its_tensors() -> None:
    _, layout = collated(TWO_GROUPS)
    moved = layout.to(torch.device("meta"))
    assert moved.cu_seqlens_q.is_meta and moved.cu_seqlens_k.is_meta
    assert not layout.cu_seqlens_q.is_meta
    assert moved.piece_lengths == layout.piece_lengths and moved.key_gather == layout.key_gather


@given(packs)
@example(TWO_GROUPS)
def test_a_mask_lets_a_query_see_its_prefix_and_the_suffix_up_to_itself(content: Any) -> None:
    _, layout = collated(content)
    for queries, keys in zip(layout.query_lengths, layout.key_lengths):
        if queries < keys:
            mask = layout.mask(queries, keys)
            assert torch.equal(mask, torch.ones(queries, keys).tril(keys - queries).bool())


def test_masks_are_views_of_one_tensor_on_the_device_of_the_layout() -> None:
    _, layout = collated(TWO_GROUPS)
    masks = [layout.mask(q, k) for q, k in zip(layout.query_lengths, layout.key_lengths) if q < k]
    assert len({mask.untyped_storage().data_ptr() for mask in masks}) == 1 < len(masks)
    moved = layout.to(torch.device("meta"))
    assert moved.mask(1, 3).is_meta and not layout.mask(1, 3).is_meta
