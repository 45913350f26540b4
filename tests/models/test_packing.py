"""packing: packed and padded layouts give the loss of separate rows, at answer tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from builders import Family, examples, tiny_model
from stages.data.examples import Example
from stages.models import packed_attention, packing
from stages.models.packing import UNBOUNDED, Batch, answer_logits, collate, packed, packs, padded
from stages.training.losses import cross_entropy

FAMILIES = pytest.mark.parametrize("family", get_args(Family))


def by_length(rows: Sequence[Example]) -> Batch:
    """As on a CPU, where the rows of these tests are too short to be worth more than one rectangle."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packed_attention, "ANOTHER", 3)
        return packed(rows, by_length=True)


LAYOUTS = pytest.mark.parametrize("layout", [packed, by_length, padded], ids=["packed", "by length", "padded"])
CPU = torch.device("cpu")
ROWS = [
    *examples([(5, 2), (1, 1), (9, 4), (3, 1), (2, 6)]),
    Example([4, 8, 5, 6, 3, 2, 2, 7, 8], 2, gaps=((3, 5), (7, 8))),  # three answers, of 1, 2 and 1 tokens
]


def is_in_gap(row: Example, place: int) -> bool:
    return any(first <= place < end for first, end in row.gaps)


def right_padded(rows: Sequence[Example]) -> dict[str, Tensor]:
    """The rows as everyone writes them for Hugging Face: padded on the right, -100 where there is no loss."""
    length = max(len(row.input_ids) for row in rows)
    ids, labels = torch.full((len(rows), length), 1), torch.full((len(rows), length), -100)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[i, row.prompt_tokens : len(row.input_ids)] = torch.tensor(row.input_ids[row.prompt_tokens :])
        for first, end in row.gaps:
            labels[i, first:end] = -100
        mask[i, : len(row.input_ids)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@FAMILIES
@LAYOUTS
def test_the_loss_is_the_hugging_face_loss_of_full_right_padded_logits(family: Family, layout: Any) -> None:
    model, batch = tiny_model(family), layout(ROWS)
    found = cross_entropy(answer_logits(model, batch), batch["labels"], batch["labels"].numel())
    expected = model(**right_padded(ROWS)).loss  # shifts by itself; the mean over all labels but -100
    assert expected.item() > 1.0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@FAMILIES
@LAYOUTS
def test_the_gradient_is_that_of_the_hugging_face_loss(family: Family, layout: Any) -> None:
    model, batch = tiny_model(family), layout(ROWS)
    cross_entropy(answer_logits(model, batch), batch["labels"], batch["labels"].numel()).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(**right_padded(ROWS)).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@FAMILIES
@LAYOUTS
def test_logits_are_those_that_predict_each_answer_token_in_the_order_of_the_batch(family: Family, layout: Any) -> None:
    model = tiny_model(family)
    places = [
        [place - 1 for place in range(row.prompt_tokens, len(row.input_ids)) if not is_in_gap(row, place)]
        for row in ROWS
    ]
    alone = [
        model(input_ids=torch.tensor([row.input_ids])).logits[0, some] for row, some in zip(ROWS, places, strict=True)
    ]
    torch.testing.assert_close(answer_logits(model, layout(ROWS)), torch.cat(alone), rtol=1e-4, atol=1e-5)


@LAYOUTS
def test_labels_are_the_answers_one_after_the_other(layout: Any) -> None:
    rows = [Example([10, 11, 12, 13], 2), Example([20, 21], 1), Example([30, 31, 32, 33, 34], 1, gaps=((2, 4),))]
    assert layout(rows)["labels"].tolist() == [12, 13, 21, 31, 34]


def test_a_packed_example_attends_to_itself_and_backwards_only() -> None:
    batch = packed([Example([5, 6, 7], 1), Example([8, 9], 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["answers"].tolist() == [0, 1, 3]  # one before each answer token: 6, 7 and 9
    there, back = batch["attention_mask"][0].tolist()
    assert there == [[0, 1, 2], [3, 4, 0]]  # the last is padding
    assert [*back[0], *back[1]][:5] == [0, 1, 2, 3, 4]


def test_a_padded_example_counts_positions_from_its_first_token() -> None:
    batch = padded([Example([5, 6, 7], 1), Example([8, 9], 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1]]
    assert batch["answers"].int().tolist() == [[1, 1, 0], [0, 1, 0]]  # of the last 2 + 1 columns


@FAMILIES
def test_transformers_that_heed_a_mask_of_four_dimensions_can_be_packed(family: Family) -> None:
    assert packs(tiny_model(family))


@pytest.mark.parametrize("training", [True, False])
def test_trying_to_pack_leaves_the_mode_of_the_model_as_it_was(training: bool) -> None:
    model = tiny_model().train(training)
    packs(model)
    assert model.training == training


class Deaf(nn.Module):
    """Stands in for models whose state runs over the border of examples: each token hears all tokens before it."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = GPT2Config()
        self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor | int, **_: Any) -> SimpleNamespace:
        logits = self.head(self.embedding(input_ids).cumsum(1))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return SimpleNamespace(logits=logits[:, kept])


class Stubborn(Deaf):
    """Stands in for models that raise when they meet a mask of four dimensions."""

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor | int, **inputs: Any) -> SimpleNamespace:
        if inputs["attention_mask"].dim() != 2:
            raise ValueError("an attention mask of shape [batch, length] is expected")
        return super().forward(input_ids, logits_to_keep)


@pytest.mark.parametrize("kind", [Deaf, Stubborn])
def test_a_model_that_ignores_or_refuses_the_mask_is_never_packed(kind: type[Deaf]) -> None:
    assert not packs(kind())


def is_packed(batch: Batch) -> bool:
    return batch["attention_mask"].dim() == 4


@pytest.mark.parametrize(("longest_packed", "expected"), [(30, True), (29, False), (0, False)])
def test_a_batch_is_packed_if_the_model_takes_its_longest_row_so(longest_packed: int, expected: bool) -> None:
    assert is_packed(collate(examples([(1, 1), (29, 1)]), longest_packed=longest_packed, device=CPU)) == expected


def test_prompts_carry_no_loss() -> None:
    # The same text with the border one token later: one answer token less, the others' logits unchanged.
    model, ids = tiny_model(), ROWS[2].input_ids
    earlier, later = (answer_logits(model, packed([Example(ids, border)])) for border in (9, 10))
    torch.testing.assert_close(earlier[1:], later)
    by_hand = F.cross_entropy(later, torch.tensor(ids[10:]))
    torch.testing.assert_close(cross_entropy(later, packed([Example(ids, 10)])["labels"], 3), by_hand)


@LAYOUTS
def test_what_stands_between_answers_is_of_prompts_and_no_label(layout: Any) -> None:
    rows = [Example([10, 11, 12, 13, 14, 15], 2, gaps=((3, 5),)), Example([20, 21], 1)]
    batch = layout(rows)
    which = (
        packing.prompts(rows, batch)[batch["attention_mask"].bool()]
        if layout is padded
        else packing.prompts(rows, batch)
    )
    assert which.flatten().tolist() == [True, True, False, True, True, False, True, False]
    assert rows[0].answer_tokens == rows[0].distilled_positions == 2


def windowed(kind: str, window: int | None) -> Any:
    """A model whose layers attend through a window, or whose every second does."""
    shape: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape, **heads, sliding_window=window, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_a_model_with_a_window_takes_rows_packed_that_are_no_longer_than_it(kind: str) -> None:
    model = windowed(kind, 9)
    assert packs(model) == 9
    for rows in (examples([(5, 2), (1, 1), (7, 2)]), examples([(5, 2), (1, 1), (8, 2), (17, 3)])):
        batch = collate(rows, longest_packed=packs(model), device=CPU)
        alone = [
            model(input_ids=torch.tensor([row.input_ids])).logits[0, row.prompt_tokens - 1 : len(row.input_ids) - 1]
            for row in rows
        ]
        assert is_packed(batch) == (len(rows) == 3)
        torch.testing.assert_close(answer_logits(model, batch), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_model_without_a_window_takes_any_row_packed() -> None:
    assert packs(windowed("mistral", None)) == UNBOUNDED


def test_heads_that_share_keys_and_dropout_are_packed_too() -> None:
    model = windowed("mistral", None)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = packed(ROWS)
    calm = answer_logits(model, batch)
    torch.manual_seed(1)
    first = answer_logits(model.train(), batch)
    torch.manual_seed(1)
    assert torch.equal(first, answer_logits(model, batch))
    assert not torch.allclose(first, calm)


def test_gradient_checkpointing_computes_packed_rows_again_as_they_were() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, batch = tiny_model("llama").train(), packed(ROWS)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        cross_entropy(answer_logits(model, batch), batch["labels"], 9).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_memory_of_attention_does_not_grow_with_the_square_of_a_packed_row() -> None:
    # 64 rows of 8 tokens: a mask of the whole would have 512 x 512 places.
    assert packed(examples([(7, 1)] * 64))["attention_mask"].numel() == 2 * 64 * 8


def test_an_attention_with_a_bias_between_positions_refuses_packed_rows() -> None:
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="bias"):
        packed_attention.attend(nn.Module(), q, q, q, packed_attention.places([2, 1]), position_bias=q)


def test_on_a_cpu_rows_of_about_one_length_are_padded_to_each_other_alone() -> None:
    lengths = [30, 92, 44, 28, 35, 22, 25, 20]
    found = packed_attention.places(lengths, by_length=True)
    assert packed_attention.slots_of(packed_attention.places(lengths), sum(lengths)).rectangles == [(8, 92)]
    there, back, rectangles, _ = packed_attention.slots_of(found, sum(lengths))
    assert rectangles == [(1, 92), (3, 44), (4, 28)]
    assert torch.equal(there[back], torch.arange(sum(lengths)))
    assert there[:92].tolist() == [*range(30, 122)]  # the longest row stands first
    assert there[92 : 92 + 44].tolist() == [*range(122, 166)]
    assert there[92 + 44 : 92 + 88].tolist() == [*range(194, 229), *[0] * 9]


def test_rows_of_one_length_or_hardly_different_ones_stand_in_one_rectangle() -> None:
    for lengths in ([7] * 64, [30, 29, 28, 27], [5]):
        assert torch.equal(packed_attention.places(lengths, by_length=True), packed_attention.places(lengths))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_batches_for_a_cpu_are_laid_out_by_length(device: str) -> None:
    batch = collate(examples([(60, 2), (4, 1)]), longest_packed=UNBOUNDED, device=torch.device(device))
    assert len(packed_attention.slots_of(batch["attention_mask"], 67).rectangles) == (2 if device == "cpu" else 1)


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("lengths", [[1], [4], [3, 1, 4], [2, 2], [1, 40, 3, 36, 90], [33, 1]])
def test_packed_attention_is_attention_row_by_row_value_and_gradient(lengths: list[int], by_length: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, weight = (
        torch.randn(1, 2, sum(lengths), 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(4)
    )
    places = packed_attention.places(lengths, by_length=by_length)
    found, _ = packed_attention.attend(nn.Module(), query, key, value, places)
    by_hand = []
    for q, k, v in zip(*(one[0].split(lengths, dim=1) for one in (query, key, value)), strict=True):
        scores = (q @ k.mT / 4**0.5).masked_fill(torch.ones(q.shape[1], q.shape[1]).triu(1).bool(), -torch.inf)
        by_hand.append((scores.softmax(-1) @ v).transpose(0, 1))
    expected = torch.cat(by_hand)[None]
    torch.testing.assert_close(found, expected)
    own = torch.autograd.grad((found * weight.transpose(1, 2)).sum(), (query, key, value))
    torch.testing.assert_close(own, torch.autograd.grad((expected * weight.transpose(1, 2)).sum(), (query, key, value)))


# --- unlabelled rows

UNLABELLED = Example(ROWS[2].input_ids, len(ROWS[2].input_ids))
MIXED = [ROWS[0], UNLABELLED, ROWS[4], Example([7], 1), ROWS[1]]
MIXTURES = pytest.mark.parametrize(
    "rows", [MIXED, [UNLABELLED], [UNLABELLED, Example([7], 1)], MIXED[::-1]], ids=["mixed", "one", "two", "reversed"]
)


@FAMILIES
@LAYOUTS
@MIXTURES
def test_an_unlabelled_row_gives_the_logits_of_what_follows_it_in_its_place(
    family: Family, layout: Any, rows: list[Example]
) -> None:
    model = tiny_model(family)
    alone = [
        model(input_ids=torch.tensor([row.input_ids])).logits[0, row.prompt_tokens - 1 :][: max(row.answer_tokens, 1)]
        for row in rows
    ]
    torch.testing.assert_close(answer_logits(model, layout(rows)), torch.cat(alone), rtol=1e-4, atol=1e-5)


@LAYOUTS
def test_an_unlabelled_row_has_no_label_in_its_place(layout: Any) -> None:
    rows = [Example([10, 11, 12], 3), Example([20, 21, 22], 1), Example([30], 1)]
    assert layout(rows)["labels"].tolist() == [-100, 21, 22, -100]


def test_the_position_of_an_unlabelled_row_is_its_last() -> None:
    rows = [Example([5, 6, 7], 1), Example([8, 9], 2)]
    assert packed(rows)["answers"].tolist() == [0, 1, 4]  # before 6 and 7; and 9, the last of its own row
    assert padded(rows)["answers"].int().tolist() == [[1, 1, 0], [0, 0, 1]]  # of the last 2 + 1 columns


def test_layers_that_are_no_attention_keep_rows_apart_however_little_they_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an untrained model a convolution hands on less than rounding does; a trained one hands on more."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "lfm2", vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, layer_types=["conv", "full_attention"], pad_token_id=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert packs(model) == 0
    monkeypatch.setattr(packing, "ATTENTION", packing.ATTENTION | {"conv"})
    assert packs(model) == UNBOUNDED, "trying alone does not find it"
