import copy
import json
import math
import platform
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from bitplan.formats.errors import UsageError
from bitplan.planner import demo
from bitplan.planner.demo import make_task as maker
from bitplan.planner.demo.make_task import make
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.tasks.harness import harness_questions
from bitplan.sensitivity.tasks.likelihood import log_likelihoods
from bitplan.sensitivity.tasks.paired import paired
from bitplan.sensitivity.tasks.question import Question
from bitplan.sensitivity.tasks.score import likelihoods, losses, score, verdict, writes
from bitplan.sensitivity.tasks.task import TokenRow, encode, make_task, read_task
from bitplan.sensitivity.texts import stdlib
from tests import tiny

BUNDLED = Path(demo.__file__).parent / "task" / "completion.jsonl"
CHOICE = {"prompt": "a = ", "choices": ["1", "two", "3\n"], "answer": 1}


@pytest.fixture
def task_of(tmp_path):
    """task_of(entries…) → the task that a file of them is, for the byte tokenizer and 128 tokens."""

    def get(*entries: object, **kwargs):
        path = tmp_path / "mine.jsonl"
        path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries), encoding="utf-8")
        return read_task(path, tiny.tokenizer(), **{"length": 128, **kwargs})

    return get


BAD = [
    ((), ":1: the task file is empty"),
    (("", "  "), ":1: the task file is empty"),
    ((CHOICE, '{"prompt": '), ":2 is no valid JSON"),
    ((CHOICE, "", "[1, 2]"), ":3: a task's line is a JSON object, not [1, 2]"),
    (({"choices": ["a", "b"], "answer": 0},), ":1: no field 'prompt'"),
    ((CHOICE, {"prompt": "a", "choices": ["a", "b"]}), ":2: no field 'answer'"),
    (({"prompt": "a", "answer": ""},), ":1: 'answer' must be text that is not empty"),
    (({"prompt": "a", "answer": 42},), ":1: 'answer' must be text that is not empty, not 42"),
    (({"prompt": None, "answer": "a"},), ":1: 'prompt' must be text"),
    (({"text": " "},), ":1: 'text' must be text"),
    (({**CHOICE, "answer": 3},), ":1: the answer 3 is not among the 3 choices"),
    (({**CHOICE, "answer": -1},), ":1: the answer -1 is not among"),
    (({**CHOICE, "answer": True},), ":1: the answer true is not among"),
    (({**CHOICE, "answer": "four"},), ':1: the answer "four" is not among'),
    (({**CHOICE, "choices": ["1"]},), ":1: 'choices' must be a list of two or more"),
    (({**CHOICE, "choices": "12"},), ":1: 'choices' must be a list of two or more"),
    (({**CHOICE, "choices": ["1", 2]},), ":1: choice 1 must be text"),
    (({**CHOICE, "choices": ["1", "1"]},), ':1: the choice "1" is there twice'),
    ((CHOICE, {"text": "abc"}), ":2: an item of the kind 'text' in a file that began with 'choice'"),
    (('{"text": "\\ud800"}',), ":1 is no valid JSON (it holds half a character"),
    (({"prompt": "a", "answer": "b" * 200},), ":1: an answer of 200 tokens leaves no room"),
    (("[" * 100_000,), ":1 is no valid JSON"),
]


@pytest.mark.parametrize(("entries", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_bad_lines_are_named(entries, sentence, task_of):
    with pytest.raises(UsageError) as error:
        task_of(*entries)
    assert sentence in str(error.value)
    assert "mine.jsonl:" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read_task(tmp_path / "none.jsonl", tiny.tokenizer(), 128)
    (tmp_path / "image.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_task(tmp_path / "image.jsonl", tiny.tokenizer(), 128)


def test_answers_by_number_and_by_text_are_the_same_task(task_of):
    by_number, by_text = task_of(CHOICE), task_of({**CHOICE, "answer": "two", "id": 7}, "")
    assert by_number.fingerprint == by_text.fingerprint
    assert (by_number.kind, by_number.name, by_number.items[0].sizes) == ("choice", "mine", (1, 3, 1))
    assert task_of({**CHOICE, "answer": 0}).fingerprint != by_number.fingerprint
    assert len(task_of(CHOICE, CHOICE, CHOICE, limit=2).items) == 2


class TestTokens:
    def test_a_token_may_span_prompt_and_answer(self):
        """The embedded model's tokenizer joins a line's end with the indentation after it."""
        tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
        pairs = (("if x:\n", "    return x"), ("if x:\n", "    pass"))
        item = encode(Question("here:1", "choice", pairs), tokenizer, 100)
        assert len({row.context for row in item.rows}) == 1
        for row, (prompt, answer) in zip(item.rows, pairs, strict=True):
            assert list(row.ids) == tokenizer(prompt + answer)["input_ids"]
            assert tokenizer.decode(row.ids[-row.scored :]).endswith(answer)
            assert tokenizer.decode(row.ids[-row.scored :]).strip() == answer.strip()

    def test_long_prompts_lose_their_beginning(self, task_of):
        task = task_of({**CHOICE, "prompt": "x" * 300 + "yz"}, CHOICE)
        longest = max(task.items[0].rows, key=lambda row: len(row.ids))
        assert len(longest.ids) == 128
        assert len({row.context for row in task.items[0].rows}) == 1
        assert tiny.tokenizer().decode(longest.context[-2:]) == "yz"
        assert task.note == "mine: 1 of 2 prompts cut from the left to fit the model"
        assert task_of(CHOICE).note is None

    def test_an_empty_prompt_begins_with_the_first_token(self, task_of):
        assert {row.context for row in task_of({**CHOICE, "prompt": ""}).items[0].rows} == {(256,)}

    @pytest.mark.parametrize("size", [2, 127, 128, 129, 254, 255, 256, 400])
    def test_windows_score_each_token_once(self, size, task_of):
        text = "".join(chr(97 + i % 26) for i in range(size))
        (item,) = task_of({"text": text}).items
        assert all(len(row.ids) <= 128 for row in item.rows)
        assert tiny.tokenizer().decode([token for row in item.rows for token in row.ids[-row.scored :]]) == text[1:]


def rows_alone(model, rows: list[TokenRow]) -> list[float]:
    """Σ log p of the scored tokens, each row by itself."""
    found = []
    for row in rows:
        log_p = model(input_ids=torch.tensor([row.ids])).logits[0].float().log_softmax(-1)
        positions = range(len(row.ids) - row.scored, len(row.ids))
        found.append(sum(float(log_p[i - 1, row.ids[i]]) for i in positions))
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "gpt-neox", "qwen3-moe"])
def test_likelihoods_are_those_of_each_row_alone(name, task_of):
    task = task_of(CHOICE, {**CHOICE, "prompt": "b : "}, {**CHOICE, "prompt": "much longer"}, CHOICE)
    model = tiny.build(name)
    rows = [row for item in task.items for row in item.rows]
    expected = torch.tensor(rows_alone(model, rows))
    torch.testing.assert_close(torch.tensor(log_likelihoods(model, rows)), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        torch.tensor(log_likelihoods(model, [row for row in rows if row.scored == 3])),
        expected[[row.scored == 3 for row in rows]],
        atol=1e-4,
        rtol=1e-5,
    )


class TestScore:
    def test_choices(self, task_of):
        entries = [{"prompt": f"{i} is", "choices": [" a", " bcd", " ef"], "answer": i % 3} for i in range(30)]
        model, task = tiny.build("llama"), task_of(*entries)
        scores = score(model, task)
        sums = torch.tensor([rows_alone(model, list(item.rows)) for item in task.items])
        right = torch.arange(30) % 3
        assert scores.values.tolist() == (sums.argmax(1) == right).double().tolist()
        assert scores.per_byte.tolist() == ((sums / torch.tensor([1, 3, 2])).argmax(1) == right).double().tolist()
        torch.testing.assert_close(torch.stack(scores.likelihoods).float(), sums, atol=1e-4, rtol=1e-4)
        assert scores.mean == float(scores.values.mean()) and scores.ppl is None

    def test_text_is_nats_per_token_across_windows(self, task_of):
        task = task_of({"text": "a text" * 40}, {"text": "short"})
        model = tiny.build("llama")
        scores = score(model, task)
        for item, value in zip(task.items, scores.values.tolist(), strict=True):
            total = -sum(rows_alone(model, list(item.rows)))
            assert value == pytest.approx(total / sum(row.scored for row in item.rows), rel=1e-5)
        assert scores.ppl == pytest.approx(math.exp(scores.mean))

    @pytest.mark.parametrize("kv_format", ["native", "int8"])
    def test_exact_is_what_generate_writes(self, kv_format, task_of):
        """Answers made from the model's own greedy text are right, and no others."""
        model, tokenizer = tiny.build("llama"), tiny.tokenizer()
        prompts = [f"{word} =" for word in ("x", "yy", "red", "blue")]
        wrote = []
        for prompt in prompts:
            ids = torch.tensor([[256, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
            out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
            wrote.append(tokenizer.decode(out[0, ids.shape[1] :]))
        lines = [(p, w.lstrip().split("\n")[0]) for p, w in zip(prompts, wrote, strict=True)]
        task = task_of(*({"prompt": p, "answer": w[:3] or "zzz"} for p, w in lines))
        scores = score(model, task, kv_format)
        settled = [verdict(w, item.expected, True) for w, item in zip(wrote, task.items, strict=True)]
        if kv_format == "native":
            assert scores.values.tolist() == [float(bool(value)) for value in settled]
        assert all(of.isfinite().all() for of in scores.likelihoods)

    def test_greedy_text_up_to_the_lines_end(self, task_of):
        """A model that goes from each letter to the next of a text: what it writes is known."""

        class Recite(torch.nn.Module):
            def __init__(self, text: str):
                super().__init__()
                self.one = torch.nn.Parameter(torch.zeros(1))
                letters = [tiny.tokenizer().decode([i]) for i in range(256)]
                follows = dict(pairwise(text))
                self.next = [letters.index(follows.get(letter, "\n")) for letter in letters] + [0, 0]

            def forward(self, input_ids, **_):
                logits = torch.eye(258)[torch.tensor(self.next)[input_ids]]
                return SimpleNamespace(logits=logits)

        task = task_of(*({"prompt": "q:", "answer": answer} for answer in (" 42", "42", "4", "420", "2")))
        model = Recite(": 42\n")
        assert [writes(model, task, item) for item in task.items] == [True, True, False, False, False]

    def test_a_model_that_gives_no_numbers_is_wrong(self, task_of):
        model = tiny.build("llama")
        model.lm_head.weight.fill_(math.nan)
        for task in (task_of(CHOICE), task_of({"prompt": "a", "answer": "b"}), task_of({"text": "abc"})):
            scores = score(model, task)
            assert losses(task, score(tiny.build("llama"), task).likelihoods, scores.likelihoods).tolist() == [math.inf]
            assert scores.values.tolist() == [math.inf if task.kind == "text" else 0]

    def test_a_kv_cache_format_is_used(self, task_of):
        task, model = task_of(CHOICE, {**CHOICE, "prompt": "for i in"}), tiny.build("llama")
        plain, eight, four = (torch.stack(likelihoods(model, task, name)) for name in ("native", "int8", "int4"))
        assert 0 < (eight - plain).abs().max() < (four - plain).abs().max()
        with pytest.raises(UsageError, match="int5"):
            score(model, task, "int5")

    def test_a_cache_that_cannot_be_handed_on_is_not(self, task_of, monkeypatch):
        task, model = task_of(CHOICE, CHOICE), tiny.build("llama")
        expected = likelihoods(model, task)
        monkeypatch.setattr("bitplan.sensitivity.tasks.likelihood._keeps_plainly", lambda model: False)
        torch.testing.assert_close(likelihoods(model, task), expected, atol=1e-5, rtol=1e-5)


VERDICTS = [
    ("42\n", "42", False, True),
    (" 42", "42", False, None),
    (" 42", "42", True, True),
    ("42 \nmore", "42", False, True),
    ("420", "42", False, False),
    ("4", "42", False, None),
    ("4", "42", True, False),
    ("", "42", False, None),
    ("5", "42", False, False),
    ("one\ntwo\n", "one\ntwo", False, True),
    ("caf\ufffd", "café", False, None),
]


@pytest.mark.parametrize(("text", "answer", "ended", "expected"), VERDICTS)
def test_verdict(text, answer, ended, expected):
    assert verdict(text, answer, ended) is expected


class TestBundled:
    def test_is_what_the_script_makes(self):
        if platform.python_version() != "3.11.7":
            pytest.skip("another Python has another standard library")
        made = make(stdlib.held_out_documents())
        assert "".join(json.dumps(item) + "\n" for item in made) == BUNDLED.read_text(encoding="utf-8")

    def test_shares_nothing_with_the_held_out_text_and_asks_for_what_can_be_told(self):
        heldout = demo.HELDOUT.read_text(encoding="utf-8")
        entries = [json.loads(line) for line in BUNDLED.read_text(encoding="utf-8").splitlines()]
        assert len(entries) == 200
        assert BUNDLED.stat().st_size < 200_000
        answers = [entry["answer"] for entry in entries]
        assert all(30 < answers.count(i) < 70 for i in range(4))
        for entry in entries:
            right = entry["choices"][entry["answer"]]
            assert entry["prompt"] + right not in heldout
            assert len({maker.indentation(choice) for choice in entry["choices"]}) == 1

    def test_known_answer_on_the_embedded_model(self):
        """All items are the population; the interval of 50 of them, drawn 100 times, covers its difference."""
        source = sources.find(demo.MODEL)
        task = read_task(BUNDLED, sources.load_tokenizer(source), 512, limit=60)
        model = sources.load_model(source)
        full = score(model, task)
        worse = copy.deepcopy(model)
        for name, parameter in worse.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                step = parameter.abs().amax(1, keepdim=True) / 3
                parameter.copy_((parameter / step).round() * step)
        low = score(worse, task)
        assert full.mean > 0.5  # chance is 0.25
        lost = losses(task, full.likelihoods, low.likelihoods)
        assert lost.min() > -1e-12 and lost.mean() > 0.01
        generator = torch.Generator().manual_seed(0)
        for one, two in ((full.values, low.values), (torch.zeros_like(lost), lost)):
            drawn = torch.randint(len(one), (100, 50), generator=generator)
            found = [paired(one[i], two[i]) for i in drawn]
            assert sum(p.low <= float((two - one).mean()) <= p.high for p in found) >= 90


class TestHarness:
    def test_is_asked_for_by_name_and_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
        with pytest.raises(UsageError, match=r"hellaswag is no file.*pip install 'bitplan\[lm-eval\]'"):
            read_task("hellaswag", tiny.tokenizer(), 128)

    @pytest.fixture
    def folder(self, tmp_path):
        """A task of its own, over a local file: where lm_eval is installed."""
        pytest.importorskip("lm_eval")
        (tmp_path / "own.yaml").write_text(
            "task: own_completion\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
            f"dataset_kwargs:\n  data_files:\n    test: {BUNDLED}\n"
            'doc_to_text: prompt\ndoc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: ""\n',
            encoding="utf-8",
        )
        return tmp_path

    def test_the_same_items_as_from_the_file(self, folder):
        tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
        task = make_task("own", harness_questions("own_completion", 50, folder), tokenizer, 512)
        assert task.fingerprint == read_task(BUNDLED, tokenizer, 512, limit=50).fingerprint

    def test_an_item_that_the_tasks_templates_cannot_read(self, folder):
        (folder / "data.jsonl").write_text(
            f"{json.dumps(CHOICE)}\n{json.dumps({**CHOICE, 'choices': None})}\n", encoding="utf-8"
        )
        sentence = (folder / "own.yaml").read_text(encoding="utf-8").replace("own_completion", "own_broken")
        (folder / "broken.yaml").write_text(
            sentence.replace(str(BUNDLED), str(folder / "data.jsonl")), encoding="utf-8"
        )
        with pytest.raises(UsageError, match="lm-evaluation-harness cannot put the questions of own_broken: "):
            harness_questions("own_broken", 5, folder)

    def test_unknown_names_come_with_near_ones(self, folder):
        with pytest.raises(UsageError, match="did you mean own_completion"):
            harness_questions("own_completions", None, folder)
