"""Only what should be learnt is, where to stop included; bits are counted over the bytes that were foreseen; answers are greedy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from luthier.contract.texts import tiny_rows, tiny_tokenizer
from luthier.data.columns import assign
from luthier.tasks.text_generation import IGNORED, TextGeneration
from luthier.training import evaluation

TOKENIZER = tiny_tokenizer("gpt2")
END = TOKENIZER.eos_token_id


def learnt(features) -> str:
    return TOKENIZER.decode([t for t in features.target[0] if t != IGNORED])


def test_of_a_prompt_and_its_completion_the_completion_and_its_end_are_learnt(rows):
    (row,) = rows([{"prompt": "the old boat", "text": "runs in the river"}])
    features = TextGeneration(True).encode(row, TOKENIZER, 48)
    assert TOKENIZER.decode(features.inputs["input_ids"]) == "the old boat runs in the river [EOS]"
    assert learnt(features) == "runs in the river [EOS]" and features.units == 5
    assert features.target[0][:3] == [IGNORED] * 3


def test_training_and_answering_frame_a_prompt_alike(rows):
    """T5-like tokenizers end every text: a prompt is not ended before its answer."""
    ending = tiny_tokenizer("t5")
    (row, asked) = rows([{"prompt": "the old boat", "text": "runs"}, {"prompt": "the old boat"}])
    whole, prompt = (TextGeneration(True).encode(r, ending, 48).inputs["input_ids"] for r in (row, asked))
    assert whole[: len(prompt)] == prompt and END not in prompt and whole.count(END) == 1


def test_a_row_without_a_prompt_among_prompted_ones_is_text_alone(rows):
    (row,) = rows([{"text": "runs in the river"}])
    assert TextGeneration(True).encode(row, TOKENIZER, 48) == TextGeneration(False).encode(row, TOKENIZER, 48)


def test_padding_is_never_learnt_even_where_it_is_the_end_token(rows, built):
    lent = tiny_tokenizer("gpt2")
    lent.pad_token = None  # the end of text fills up
    found = rows([{"text": "the boat"}, {"text": "the old boat runs in the river"}])
    task = TextGeneration()
    batch = task.collate([task.encode(row, lent, 48) for row in found], (0, 1), lent)
    assert batch.inputs["input_ids"][0].tolist()[3:] == [END] * 5
    assert batch.targets["labels"][0].tolist() == [*batch.inputs["input_ids"][0, :2].tolist(), END, *[IGNORED] * 5]


def test_the_loss_is_a_plain_sum_over_what_is_foreseen(rows, built):
    found = rows(tiny_rows("text-generation", 6))
    task = TextGeneration()
    model = built(task, "gpt2")
    batch = task.collate([task.encode(row, TOKENIZER, 48) for row in found], range(6), TOKENIZER)
    expected, count = 0.0, 0
    with torch.no_grad():
        for row in found:
            ids = torch.tensor([*TOKENIZER(row["text"])["input_ids"], END])
            expected -= float(model(ids[None]).logits[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum())
            count += len(ids) - 1
        term = task.loss(model, batch)
    assert float(term.sum) == pytest.approx(expected, rel=1e-5) and term.count == count


def test_bits_are_counted_over_the_bytes_that_were_foreseen(rows, built):
    """A model that knows nothing spends log2(vocabulary) bits a token, on whole texts and on cut ones."""
    text = "the old boat runs in the river"
    task = TextGeneration()
    model = built(task, "gpt2")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    bits = math.log2(model.config.vocab_size)
    for length, foreseen, tokens in ((48, " old boat runs in the river", 7), (4, " old boat runs", 3)):
        outputs = evaluation.outputs(model, task, [task.encode(row, TOKENIZER, length) for row in rows([{"text": text}])], TOKENIZER)
        found = task.measure(outputs, rows([{"text": text}]))
        assert found["bits_per_byte"].value == pytest.approx(bits * tokens / len(foreseen.encode()), rel=1e-5)
        assert found["perplexity"].value == pytest.approx(model.config.vocab_size, rel=1e-5)


def test_bytes_are_those_of_the_completion(rows):
    (row,) = rows([{"prompt": "the old boat", "text": "grün runs"}])
    features = TextGeneration(True).encode(row, TOKENIZER, 48)
    assert features.target[1] == len("grün runs".encode())
    assert TextGeneration(True).encode(row, TOKENIZER, 3).units == 0  # nothing of the completion is left, and it says so


def test_metrics_weigh_tokens_and_bytes_not_rows(rows):
    outputs = [np.array([10.0, 4, 1, 20]), np.array([2.0, 8, 8, 30])]
    found = TextGeneration().measure(outputs, rows([{"text": "a"}, {"text": "b"}]))
    assert found["perplexity"].value == pytest.approx(math.exp(1))
    assert found["bits_per_byte"].value == pytest.approx(12 / math.log(2) / 50)
    assert found["token_accuracy"].value == pytest.approx(9 / 12)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("prompted", [True, False])
def test_answers_are_greedy_and_independent_of_the_batch(architecture, prompted, rows, built):
    task = TextGeneration(prompted, max_new_tokens=6)
    model = built(task, architecture)
    role = "prompt" if prompted else "text"
    assert task.reads == (role,)
    asked = rows({role: r["text"]} for r in tiny_rows("text-generation", 5))
    answers = task.answers(model, [task.encode(row, TOKENIZER, 48) for row in asked], asked, TOKENIZER)
    for row, answer in zip(asked, answers, strict=True):
        ids = TOKENIZER(row[role])["input_ids"]
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 6 and ids[-1] != END:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer["predicted"] == TOKENIZER.decode(ids[start:], skip_special_tokens=True)


def test_a_prompt_too_long_for_the_model_leaves_room_for_the_answer(rows, built):
    task = TextGeneration(True, max_new_tokens=10)
    model = built(task, "gpt2")  # 64 positions
    long, end = rows([{"prompt": "boat " * 62 + "the red tree"}]), rows([{"prompt": "boat " * 51 + "the red tree"}])
    answer = [task.answers(model, [task.encode(row, TOKENIZER, 64) for row in asked], asked, TOKENIZER) for asked in (long, end)]
    assert answer[0] == answer[1]  # its end was read


def test_answers_end_where_training_ended_texts_and_read_what_was_said_to_be_read(rows, built, monkeypatch):
    task = TextGeneration(True, max_new_tokens=3)
    model = built(task, "gpt2")
    model.generation_config.eos_token_id = 3  # another end than the tokenizer's
    asked = rows({"prompt": "boat " * n} for n in (30, 2, 1))
    features = [task.encode(row, TOKENIZER, 8) for row in asked]
    assert [f.truncated for f in features] == [22, 0, 0]
    calls = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: (calls.append(given), generate(**given))[1])
    assert len(task.answers(model, features, asked, TOKENIZER, batch_size=2)) == 3
    assert [call["input_ids"].shape for call in calls] == [(2, 8), (1, 1)] and all(call["eos_token_id"] == sorted({3, END}) for call in calls)


def test_an_empty_prompt_is_answered(rows, built):
    task = TextGeneration(True, max_new_tokens=3)
    asked = rows([{}])
    (answer,) = task.answers(built(task, "gpt2"), [task.encode(row, TOKENIZER, 48) for row in asked], asked, TOKENIZER)
    assert isinstance(answer["predicted"], str)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2", "llama"])
def test_no_model_sees_what_it_should_foresee(architecture, built):
    """Encoders with a language-modelling head look ahead unless their config says otherwise."""
    model = built(TextGeneration(), architecture)
    one, other = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9]])
    with torch.no_grad():
        assert torch.equal(model(one).logits[:, :3], model(other).logits[:, :3])


def test_roles_are_found_by_name_and_the_prompt_comes_first(rows):
    found = rows({"completion": f"a {i}", "prompt": f"b {i}"} for i in range(60))
    assert list(assign(found, TextGeneration.columns, {})[0].items()) == [("prompt", "prompt"), ("text", "completion")]


def test_the_example_shows_what_is_read_and_what_is_learnt(rows):
    (row,) = rows([{"prompt": "the old boat", "text": "runs"}])
    task = TextGeneration(True)
    assert task.describe(row, task.encode(row, TOKENIZER, 48), TOKENIZER) == "the old boat  ->  runs [EOS]"
