"""Rows of training data, decoded back to what was written by hand; their order, and resuming within it."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxseek.config.model import ConfigError
from jaxseek.config.run import RunConfig
from jaxseek.data.dataset import open_prompts, open_rows, train_tokenizer
from jaxseek.data.samples import python_manual
from jaxseek.tokenizer import chat
from jaxseek.tokenizer.tokenizer import Tokenizer, train_sentencepiece

SHARED = Path(__file__).parents[3] / "shared" / "data"
B, E, U, A = map(str, (chat.BOS, chat.EOS, chat.USER, chat.ASSISTANT))
DOCUMENTS = [f"Document {i}: " + "the cat sat on the mat, " * (i % 5) + f"{i * i}." for i in range(23)]
QUESTIONS = [{"prompt": f"What is {i}+1?", "response": f"It is {i + 1}" + "!" * (i % 7)} for i in range(23)]
PAIRS = [{"prompt": f"Say {i}", "chosen": f"{i}", "rejected": f"not {i}"} for i in range(23)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    fim = (chat.FIM_BEGIN, chat.FIM_HOLE, chat.FIM_END)
    control = (chat.USER, chat.ASSISTANT, chat.THINK, chat.THINK_END, *fim, "<|im_start|>", "<|im_end|>")
    train_sentencepiece([*DOCUMENTS, "What is 2+2? It is 4! Assistant: User: Say not"], 340, path, control)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer.from_dir(directory)


@pytest.fixture
def write(tmp_path):
    def write(records, name="data.jsonl"):
        path = tmp_path / name
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        else:
            path.write_text(json.dumps(records) if name.endswith(".json") else records, "utf-8")
        return str(path)

    return write


def run(objective, train, seed=0, **data):
    distill = {"teacher": "teacher"} if objective == "distill" else {}
    data = {"train": train, "length": 64} | data
    return RunConfig.from_dict(
        {"objective": objective, "model": "m", "out": "o", "steps": 1, "seed": seed}
        | {"data": data, "distill": distill}
    )


def one_pass(config, tokenizer, **options):
    return list(open_rows(config, tokenizer, repeat=False, **options))


def texts(row, tokenizer):
    """(the whole, what is to be learnt) of each segment of a row, after a look at the row's own form."""
    tokens, segments, weights = row["tokens"], row["segments"], row["weights"]
    assert (tokens.dtype, segments.dtype, weights.dtype) == (np.int32, np.int32, np.float32)
    used = np.count_nonzero(segments)
    assert (np.diff(segments[:used]) >= 0).all()
    assert set(segments[:used]) == set(range(1, segments.max() + 1))
    assert not segments[used:].any()
    assert not weights[segments == 0].any()
    assert (tokens[used:] == tokenizer.pad_id).all()
    found = []
    for segment in range(1, segments.max() + 1):
        inside = segments == segment
        assert weights[inside][0] == 0
        learnt = tokens[inside & (weights == 1)]
        found.append((tokenizer.decode(tokens[inside], False), tokenizer.decode(learnt, False)))
    return found


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# ---- Pretraining.


def test_packed_documents_lose_nothing_and_go_on_in_the_next_row(write, tokenizer):
    rows = one_pass(run("pretrain", write([{"text": t} for t in DOCUMENTS]), shuffle=False), tokenizer)
    assert all(row["tokens"].shape == (64,) for row in rows)
    joined = np.concatenate([row["tokens"][row["segments"] > 0] for row in rows]).tolist()
    assert joined == [i for t in DOCUMENTS for i in [*tokenizer.encode(t), *tokenizer.eos_ids]]
    assert all((row["segments"] > 0).all() for row in rows[:-1])
    assert [t for row in rows for t, _ in texts(row, tokenizer)][:2] == [f"{B}{d}{E}" for d in DOCUMENTS[:2]]


def test_all_of_a_document_counts_but_what_follows_nothing(write, tokenizer):
    row = one_pass(run("pretrain", write([{"text": "a cat"}, {"text": "a mat"}])), tokenizer)[0]
    assert sorted(texts(row, tokenizer)) == [(f"{B}a cat{E}", f"a cat{E}"), (f"{B}a mat{E}", f"a mat{E}")]


def test_without_packing_a_document_has_a_row_and_may_be_too_long(write, tokenizer):
    path = write(["short", "the cat sat on the mat " * 50, "shorter"])
    config = run("pretrain", path, packing=False, shuffle=False)
    rows = open_rows(config, tokenizer, repeat=False)
    assert [texts(row, tokenizer) for row in rows] == [
        [(f"{B}short{E}", f"short{E}")],
        [(f"{B}shorter{E}", f"shorter{E}")],
    ]
    assert rows.counts == {"examples": 3, "epoch": 1, "too_long": 1}
    cut = run("pretrain", path, packing=False, shuffle=False, too_long="cut")
    rows = open_rows(cut, tokenizer, repeat=False)
    whole = tokenizer.encode("the cat sat on the mat " * 50)
    assert list(rows)[1]["tokens"].tolist() == whole[:64]
    assert rows.counts["too_long"] == 1
    error = run("pretrain", path, packing=False, shuffle=False, too_long="error")
    with pytest.raises(ConfigError, match=r"data\.jsonl, line 2 has \d+ tokens, data\.length is 64"):
        one_pass(error, tokenizer)


def test_text_never_becomes_a_control_token(write, tokenizer):
    row = one_pass(run("pretrain", write([f"{E}{U}<think>"])), tokenizer)[0]
    ids = row["tokens"][row["segments"] > 0].tolist()
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_ids[0]
    assert not {tokenizer.bos_id, tokenizer.token_id("<think>"), *tokenizer.eos_ids} & set(ids[1:-1])


def test_fill_in_the_middle_puts_each_document_together_again(write, tokenizer):
    config = run("pretrain", write(DOCUMENTS), packing=False, shuffle=False, fim_rate=0.5, length=256)
    found = [texts(row, tokenizer)[0][0] for row in one_pass(config, tokenizer)]
    turned = 0
    for text, document in zip(found, DOCUMENTS, strict=True):
        if str(chat.FIM_BEGIN) in text:
            turned += 1
            before, rest = text.split(str(chat.FIM_HOLE))
            after, middle = rest.split(str(chat.FIM_END))
            text = before.replace(str(chat.FIM_BEGIN), "") + middle.removesuffix(E) + after + E
        assert text == f"{B}{document}{E}"
    assert 5 < turned < 18
    again = [texts(row, tokenizer)[0][0] for row in one_pass(config, tokenizer)]
    other = [texts(row, tokenizer)[0][0] for row in one_pass(config.replace(seed=1), tokenizer)]
    assert found == again != other


# ---- Supervised fine-tuning.


def sft_texts(write, tokenizer, *records, **data):
    data = {"shuffle": False, "length": 256} | data
    return [
        t for row in one_pass(run("sft", write(records), **data), tokenizer) for t in texts(row, tokenizer)
    ]


def talk(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_prompts_and_responses_are_rendered_and_only_responses_learnt(write, tokenizer):
    assert sft_texts(write, tokenizer, {"prompt": "2+2?", "response": "It is 4."}) == [
        (f"{B}{U}2+2?{A}It is 4.{E}", f"It is 4.{E}")
    ]


def test_every_answer_of_a_conversation_is_learnt(write, tokenizer):
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "1+1?")]
    record = talk(*turns, ("assistant", "2"), ("user", "never answered"))
    assert sft_texts(write, tokenizer, record) == [
        (f"{B}Be kind.{U}Hi{A}Hello{E}{U}1+1?{A}2{E}", f"Hello{E}2{E}")
    ]


def test_r1_learns_its_last_thoughts_and_not_the_turns_whose_thoughts_are_dropped(write, tokenizer):
    assert tokenizer.template == "deepseek_r1"
    first, last = "<think>\na\n</think>\n\nb", "<think>\nc\n</think>\n\nd"
    record = talk(("user", "x"), ("assistant", first), ("user", "y"), ("assistant", last))
    whole = f"{B}{U}x{A}\n\nb{E}{U}y{A}{last}{E}"
    assert sft_texts(write, tokenizer, record) == [(whole, last + E)]
    row = one_pass(run("sft", write([record])), tokenizer)[0]
    assert np.count_nonzero(row["tokens"] == tokenizer.token_id("<think>")) == 1


@pytest.mark.parametrize(
    ("template", "reply", "prompt", "learnt"),
    [
        ("deepseek_v2", "b", f"{B}User: a\n\nAssistant:", f" b{E}"),
        ("deepseek_v3", "b", f"{B}{U}a{A}", f"b{E}"),
        ("deepseek_distill", "<think>\nc\n</think>\n\nb", f"{B}{U}a{A}<think>\n", f"c\n</think>\n\nb{E}"),
        ("deepseek_distill", "b", f"{B}{U}a{A}", f"b{E}"),
        ("deepseek_v3_1", "<think>c</think>b", f"{B}{U}a{A}<think>", f"c</think>b{E}"),
        ("deepseek_v3_1", "b", f"{B}{U}a{A}</think>", f"b{E}"),
    ],
)
def test_an_answer_follows_the_prompt_of_its_family(write, directory, template, reply, prompt, learnt):
    own = Tokenizer.from_dir(directory, template=template)
    record = {"prompt": "a", "response": reply}
    assert sft_texts(write, own, record) == [(prompt + learnt, learnt)]
    asked = own.render_chat([{"role": "user", "content": "a"}], thinking=None)
    if template in ("deepseek_v2", "deepseek_v3"):
        assert own.decode(asked, False) == prompt


@pytest.mark.parametrize("template", ["deepseek_v2", "deepseek_v3", "deepseek_distill", "deepseek_v3_1"])
def test_answers_without_thoughts_are_learnt_in_every_turn_of_every_family(write, directory, template):
    own = Tokenizer.from_dir(directory, template=template)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    [(_, learnt)] = sft_texts(write, own, talk(*turns, ("assistant", "f")))
    assert learnt.replace(" ", "") == f"b{E}d{E}f{E}"


def chatml(directory, tmp_path, template):
    own = Tokenizer.from_dir(directory)
    own.save(tmp_path / "chatml")
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    (tmp_path / "chatml" / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "chatml" / "chat_template.jinja").write_text(template)
    return Tokenizer.from_dir(tmp_path / "chatml")


def test_a_model_with_its_own_template_learns_what_that_puts_behind_the_prompt(write, directory, tmp_path):
    own = chatml(directory, tmp_path, CHATML)
    assert own.template == "jinja"
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    whole = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns).removesuffix(
        "\n"
    )
    row = one_pass(run("sft", write([talk(*turns)])), own)[0]
    used = row["segments"] > 0
    assert own.decode(row["tokens"][used], False) == whole
    assert own.decode(row["tokens"][row["weights"] == 1], False) == "b<|im_end|>d<|im_end|>"


def test_a_template_that_does_not_continue_its_own_prompt_is_refused(write, directory, tmp_path):
    own = chatml(directory, tmp_path, CHATML.replace("<|im_start|>assistant", "<|im_start|>bot"))
    with pytest.raises(ConfigError, match=r"data.jsonl, line 1: the chat template does not continue its own"):
        one_pass(run("sft", write(QUESTIONS), shuffle=False), own)


def test_without_a_template_the_response_follows_the_prompt_as_it_is(write, directory):
    plain = Tokenizer.from_dir(directory)
    plain.template = None
    assert sft_texts(write, plain, {"prompt": "2+2? ", "response": "4"}) == [(f"{B}2+2? 4{E}", f"4{E}")]
    with pytest.raises(
        ConfigError, match="line 1: this tokenizer has no chat template, and so no form for 4"
    ):
        sft_texts(write, plain, talk(*[("user", "a"), ("assistant", "b")] * 2))


def test_packing_fits_every_example_into_some_row_whole(write, tokenizer):
    config = run("sft", write(QUESTIONS), length=128)
    found = [texts(row, tokenizer) for row in one_pass(config, tokenizer)]
    expected = [f"{B}{U}{q['prompt']}{A}{q['response']}{E}" for q in QUESTIONS]
    assert sorted(whole for row in found for whole, _ in row) == sorted(expected)
    tokens = sum(len(tokenizer.encode_trusted(text)) for text in expected)
    assert len(found) <= tokens / 128 + 2
    single = one_pass(run("sft", write(QUESTIONS), length=128, packing=False), tokenizer)
    assert len(single) == len(QUESTIONS)


def test_packed_rows_keep_epochs_apart(write, tokenizer):
    rows = open_rows(run("sft", write(QUESTIONS), length=4096), tokenizer)
    epochs = [texts(next(rows), tokenizer) for _ in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows.counts["epoch"] == 3


def test_examples_that_are_too_long_are_dropped_cut_and_counted(write, tokenizer):
    data = [QUESTIONS[0], {"prompt": "a" * 50, "response": "b" * 100}, {"prompt": "a" * 100, "response": "b"}]
    rows = open_rows(run("sft", write(data), shuffle=False), tokenizer, repeat=False)
    assert len([t for row in rows for t in texts(row, tokenizer)]) == 1
    assert rows.counts["too_long"] == 2
    rows = open_rows(run("sft", write(data), shuffle=False, too_long="cut"), tokenizer, repeat=False)
    cut = [t for row in rows for t in texts(row, tokenizer)]
    assert len(cut) == 2  # of the last one no answer is left
    assert cut[1][0].startswith(f"{B}{U}{'a' * 50}{A}b")
    assert set(cut[1][1]) == {"b"}
    assert rows.counts["too_long"] == 2


def test_data_of_which_nothing_fits_is_an_error_and_no_endless_search(write, tokenizer):
    for repeat in (True, False):
        rows = open_rows(run("sft", write(QUESTIONS), length=4), tokenizer, repeat=repeat)
        with pytest.raises(ConfigError, match=r"none of the 23 examples can be used: 2[34] are longer"):
            next(rows)


# ---- Preference pairs, and what distillation reads.


def expected_pair(number):
    prompt = f"{B}{U}Say {number}{A}"
    return [(f"{prompt}{number}{E}", f"{number}{E}"), (f"{prompt}not {number}{E}", f"not {number}{E}")]


def pair_texts(row, tokenizer):
    halves = [{key: row[key][half] for key in ("tokens", "segments", "weights")} for half in (0, 1)]
    return [texts(half, tokenizer)[0] for half in halves]


def test_a_pair_is_a_row_of_two_with_its_number(write, tokenizer):
    for row in one_pass(run("dpo", write(PAIRS)), tokenizer):
        assert row["tokens"].shape == row["segments"].shape == row["weights"].shape == (2, 64)
        assert row["index"].dtype == np.int32
        assert pair_texts(row, tokenizer) == expected_pair(int(row["index"]))


@pytest.mark.parametrize("shape", ["messages", "reply messages", "prompt messages", "whole", "sharegpt"])
def test_pairs_are_read_in_every_shape_they_come_in(write, tokenizer, shape):
    ask = {"role": "user", "content": "Say 3"}
    yes, no = ({"role": "assistant", "content": text} for text in ("3", "not 3"))
    columns, roles = {}, {}
    match shape:
        case "messages":
            record = {"messages": [ask], "chosen": "3", "rejected": "not 3"}
        case "reply messages":
            record = {"prompt": "Say 3", "chosen": yes, "rejected": [no]}
        case "prompt messages":
            record = {"prompt": [ask], "chosen": [yes], "rejected": [no]}
        case "whole":
            record = {"chosen": [ask, yes], "rejected": [ask, no]}
        case _:
            say = lambda who, text: {"from": who, "value": text}
            record = {"conversations": [say("human", "Say 3")], "chosen": say("gpt", "3")}
            record |= {"rejected": say("gpt", "not 3")}
            columns = {"messages": "conversations", "role": "from", "content": "value"}
            roles = {"human": "user", "gpt": "assistant"}
    row = one_pass(run("dpo", write([record]), columns=columns, roles=roles), tokenizer)[0]
    assert pair_texts(row, tokenizer) == expected_pair(3)


def test_distillation_reads_conversations_where_there_are_some_and_else_documents(write, tokenizer):
    by_chat = one_pass(run("distill", write(QUESTIONS)), tokenizer)
    assert all(same(a, b) for a, b in zip(by_chat, one_pass(run("sft", write(QUESTIONS)), tokenizer)))
    by_text = one_pass(run("distill", write(DOCUMENTS)), tokenizer)
    assert all(same(a, b) for a, b in zip(by_text, one_pass(run("pretrain", write(DOCUMENTS)), tokenizer)))


def test_prompts_are_what_comes_before_the_answer(write):
    records = [{"prompt": "a", "response": "b"}, talk(("user", "c"), ("assistant", "d"))]
    prompts = open_prompts(run("distill", write(records)))
    assert list(prompts) == [[{"role": "user", "content": "a"}], [{"role": "user", "content": "c"}]]
    assert len(open_prompts(run("distill", write([{"prompt": "no answer needed"}])))) == 1


# ---- Order.

CASES = {
    "documents": ("pretrain", DOCUMENTS, {"fim_rate": 0.3}),
    "single": ("sft", QUESTIONS, {"packing": False, "too_long": "cut", "length": 20}),
    "fitted": ("sft", QUESTIONS, {"length": 80}),
    "fitted with some dropped": ("sft", QUESTIONS, {"length": 22}),
    "pairs": ("dpo", PAIRS, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_resuming_anywhere_equals_never_having_stopped(write, tokenizer, case, monkeypatch):
    monkeypatch.setattr("jaxseek.data.rows.WINDOW", 3)
    objective, records, data = CASES[case]
    config = run(objective, write(records), **data)
    rows = open_rows(config, tokenizer)
    seen, states, counts = [], [], []
    while rows.counts["epoch"] < 2.5:
        states.append(json.dumps(rows.get_state()))
        counts.append(rows.counts)
        seen.append(next(rows))
    assert len(seen) > 5
    for start in {0, 1, 2, 3, 5, len(seen) // 2, len(seen) - 1}:
        resumed = open_rows(config, tokenizer)
        next(resumed)  # wherever it was
        resumed.set_state(json.loads(states[start]))
        for row, state, count in zip(seen[start:], states[start:], counts[start:]):
            assert json.dumps(resumed.get_state()) == state
            assert resumed.counts == count
            assert same(next(resumed), row)


def test_the_end_of_a_pass_can_be_resumed_too(write, tokenizer):
    config = run("sft", write(QUESTIONS), length=80)
    rows = open_rows(config, tokenizer, repeat=False)
    states, seen = zip(*[(rows.get_state(), row) for row in rows])  # a state behind each row
    resumed = open_rows(config, tokenizer, repeat=False)
    resumed.set_state(states[-2])
    assert same(next(resumed), seen[-1])
    assert next(resumed, None) is None
    resumed.set_state(states[-1])
    assert next(resumed, None) is None
    assert next(resumed, None) is None


def test_an_epoch_has_every_example_once_in_an_order_of_its_own(write, tokenizer):
    rows = open_rows(run("dpo", write(PAIRS)), tokenizer)
    epochs = [[int(next(rows)["index"]) for _ in PAIRS] for _ in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    other = open_rows(run("dpo", write(PAIRS), seed=1), tokenizer)
    assert [int(next(other)["index"]) for _ in PAIRS] != epochs[0]
    fixed = open_rows(run("dpo", write(PAIRS), shuffle=False), tokenizer)
    assert [int(next(fixed)["index"]) for _ in range(46)] == [*range(23)] * 2


def test_a_state_from_when_hosts_had_shards_is_taken_up(write, tokenizer):
    rows = open_rows(run("dpo", write(PAIRS)), tokenizer)
    next(rows)
    state = rows.get_state() | {"shard": [0, 1]}
    resumed = open_rows(run("dpo", write(PAIRS)), tokenizer)
    resumed.set_state(state)
    assert same(next(resumed), next(rows))


def test_a_state_of_other_data_is_refused(write, tokenizer):
    rows = open_rows(run("dpo", write(PAIRS)), tokenizer)
    state = rows.get_state()
    with pytest.raises(ConfigError, match="has examples 23, and now examples is 22"):
        open_rows(run("dpo", write(PAIRS[1:])), tokenizer).set_state(state)


# ---- Evaluation data.


def test_held_out_examples_are_never_trained_on(write, tokenizer):
    config = run("dpo", write(PAIRS), holdout=0.2)
    train, held = one_pass(config, tokenizer), one_pass(config, tokenizer, split="eval")
    train, held = ({int(row["index"]) for row in rows} for rows in (train, held))
    assert len(held) == 5
    assert train | held == set(range(23))
    assert not train & held
    again = one_pass(config.replace(seed=7), tokenizer, split="eval")
    assert [int(row["index"]) for row in again] == sorted(held)


def test_evaluation_files_are_read_in_their_order_and_spare_the_training_data(write, tokenizer):
    config = run("dpo", write(PAIRS), eval=write(PAIRS[::-1], "eval.jsonl"), holdout=0.2)
    assert len(one_pass(config, tokenizer)) == 23
    found = [pair_texts(row, tokenizer) for row in one_pass(config, tokenizer, split="eval")]
    assert found == [expected_pair(i) for i in reversed(range(23))]


def test_without_evaluation_data_there_are_no_rows(write, tokenizer):
    assert open_rows(run("dpo", write(PAIRS)), tokenizer, split="eval") is None
    assert open_prompts(run("dpo", write(PAIRS)), split="eval") is None


def test_a_holdout_that_leaves_nothing_is_an_error(write, tokenizer):
    with pytest.raises(ConfigError, match=r"data.holdout 1.0 of 23 examples leaves none to train on"):
        open_rows(run("dpo", write(PAIRS), holdout=1.0), tokenizer)


# ---- Sources.


def wholes(config, tokenizer):
    return sorted(whole for row in one_pass(config, tokenizer) for whole, _ in texts(row, tokenizer))


def test_files_directories_and_globs_are_read_in_order(write, tokenizer, tmp_path):
    (tmp_path / "many" / "deep").mkdir(parents=True)
    (tmp_path / "many" / ".git").mkdir()
    write("hidden", "many/.git/x.txt")
    write("one", "many/a.txt")
    write(["two"], "many/b.jsonl")
    write([{"text": "three"}, "four"], "many/c.json")
    write("five", "many/deep/d.md")
    for source in (["many"], ["many/*.*", "many/deep"], ["many/**/*"]):
        source = [str(tmp_path / s) for s in source]
        rows = one_pass(run("pretrain", source, packing=False, shuffle=False), tokenizer)
        found = [texts(row, tokenizer)[0][0] for row in rows]
        assert found == [f"{B}{word}{E}" for word in ("one", "two", "three", "four", "five")]


def test_blank_lines_are_passed_over_and_lines_keep_their_numbers(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "a"}\r\n\n\r\n"b"')
    assert wholes(run("pretrain", str(tmp_path / "a.jsonl"), packing=False), tokenizer) == [
        f"{B}a{E}",
        f"{B}b{E}",
    ]
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "a"}\n\n{"text": ')
    with pytest.raises(ConfigError, match=r"a.jsonl, line 4: not valid JSON"):
        open_rows(run("pretrain", str(tmp_path / "a.jsonl")), tokenizer)


def test_parquet_is_read(tokenizer, tmp_path):
    pyarrow.parquet.write_table(
        pa.Table.from_pylist([talk(("user", "a"), ("assistant", "b"))]), tmp_path / "a.parquet"
    )
    assert wholes(run("sft", str(tmp_path / "a.parquet")), tokenizer) == [f"{B}{U}a{A}b{E}"]
    with pytest.raises(ConfigError, match=r"a.parquet, row 1 has no column 'text' \(it has 'messages'\)"):
        open_rows(run("pretrain", str(tmp_path / "a.parquet")), tokenizer)


def test_a_missing_package_is_named(monkeypatch, tokenizer, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    for source in (str(tmp_path / "a.parquet"), "hf://datasets/o/n/a.parquet"):
        with pytest.raises(ConfigError, match=r"pip install (pyarrow|huggingface_hub)"):
            open_rows(run("pretrain", source), tokenizer)


def test_hub_names_become_files_of_the_hubs_cache(monkeypatch, write, tokenizer):
    """The hub is played by a module; nothing is fetched."""
    local = {"a.jsonl": write(["one"], "1.jsonl"), "b.jsonl": write(["two"], "2.jsonl")}

    class HfFileSystem:
        def glob(self, path):
            assert path == "datasets/o/n/*.jsonl"
            return [f"datasets/o/n/{name}" for name in local]

        def isdir(self, path):
            return path == "datasets/o/n"

        def find(self, path):
            return [f"{path}/{name}" for name in local]

        def resolve_path(self, path):
            repo_id, name = path.removeprefix("datasets/").rsplit("/", 1)
            return types.SimpleNamespace(
                repo_id=repo_id, path_in_repo=name, repo_type="dataset", revision="main"
            )

    def hf_hub_download(repo_id, filename, *, repo_type, revision):
        assert (repo_id, repo_type, revision) == ("o/n", "dataset", "main")
        return local[filename]

    hub = types.SimpleNamespace(HfFileSystem=HfFileSystem, hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for source in ("hf://datasets/o/n/*.jsonl", "hf://datasets/o/n"):
        assert len(wholes(run("pretrain", source, packing=False), tokenizer)) == 2
    assert wholes(run("pretrain", "hf://datasets/o/n/b.jsonl"), tokenizer) == [f"{B}two{E}"]
    with pytest.raises(
        ConfigError, match=r"hf://datasets/o/n/c.jsonl cannot be fetched \(KeyError: 'c.jsonl'"
    ):
        open_rows(run("pretrain", "hf://datasets/o/n/c.jsonl"), tokenizer)


def test_the_python_manual_is_at_hand(tokenizer):
    documents = python_manual()
    assert sum(len(d["text"]) for d in documents) > 300_000
    rows = open_rows(run("pretrain", "python:jaxseek.data.samples:python_manual"), tokenizer)
    assert (next(rows)["segments"] > 0).all()


def numbered(count: int, share=0.5, loud: bool = False, word="a", *, start=None):
    return [{"text": f"{word} {i} {share!r} {loud} {start}"} for i in range(count)]


def test_a_function_is_called_with_the_arguments_behind_its_name(tokenizer):
    def texts(query):
        source = f"python:{__name__}:numbered?{query}"
        return wholes(run("pretrain", source, packing=False, shuffle=False), tokenizer)

    assert texts("count=2&share=1&loud=true&word=b=b%26") == [f"{B}b=b& {i} 1.0 True None{E}" for i in (0, 1)]
    assert texts("count=1&start=4") == [f"{B}a 0 0.5 False 4{E}"]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("cuont=3", r"has no argument cuont; did you mean count\?"),
        ("zzz=3", r"has no argument zzz; known: count, share, loud, word, start"),
        ("count=3.5", r"count is '3.5', expected int"),
        ("count=3&loud=yes", r"loud is 'yes', expected bool"),
        ("share=0.1", r"missing a required argument: 'count'; give it as FUNCTION\?key=value"),
        ("count", r"expected FUNCTION\?key=value&key=value"),
    ],
)
def test_arguments_that_the_function_does_not_take_are_refused(query, message, tokenizer):
    with pytest.raises(ConfigError, match=message):
        open_rows(run("pretrain", f"python:{__name__}:numbered?{query}"), tokenizer)


ERRORS = {
    "no data": ("pretrain", "nowhere.jsonl", r"data.train: there is no .*nowhere.jsonl"),
    "a near name": ("sft", "dada.jsonl", r"there is no .*dada.jsonl; did you mean .*data.jsonl\?"),
    "an empty glob": ("sft", "*.parquet", r"data.train: no file matches .*\*.parquet"),
    "an empty file": ("sft", b"", r"data.jsonl is empty"),
    "only blank lines": ("sft", b"\n\n", r"data.train = \[.*\] holds no examples"),
    "no JSON": ("sft", b'{"prompt": "a", "response": "b"}\n{"prompt', r"data.jsonl, line 2: not valid JSON"),
    "a number": ("sft", [3], r"line 1 is a int, expected an object or a string"),
    "no text": ("pretrain", [{"txt": "a"}], r"has no column 'text' \(it has 'txt'\); .*: text = \"txt\""),
    "no response": ("sft", [{"prompt": "a", "answer": "b"}], r"no column 'response' .*: response = "),
    "no prompt": ("sft", [{"question": "a"}], r"no column 'messages' and no prompt either"),
    "no chosen": ("dpo", [{"prompt": "a", "rejected": "b"}], r"line 1 has no column 'chosen'"),
    "no text but a list": (
        "pretrain",
        [{"text": ["a"]}],
        r"line 1: text is list \['a'\], expected a string",
    ),
    "no messages": ("sft", [{"messages": "a"}], r"line 1: messages is str 'a', expected a list"),
    "no message": ("sft", [{"messages": [{"from": "a"}]}], r"messages\[0\] is dict .* \[data.columns\]"),
    "an unknown role": ("sft", [talk(("human", "a"))], r"has the role 'human', .* human = \"user\""),
    "no answer": ("sft", [talk(("user", "a"))], r"no message in messages is the assistant's"),
    "no content": ("sft", [talk(("user", 3))], r"messages\[0\] has content int 3, expected a string"),
    "a reply by the user": (
        "dpo",
        [{"prompt": "a", "chosen": {"role": "user", "content": "b"}, "rejected": "c"}],
        r"line 1: chosen is by the user, expected the assistant's reply",
    ),
    "a function that is not there": (
        "sft",
        "python:json:nothing",
        r"python:json:nothing: .*MODULE:FUNCTION",
    ),
    "no list": ("sft", "python:os:getpid", r"python:os:getpid holds a int, expected a list"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_every_fault_is_named_when_the_data_is_opened(name, write, tokenizer, tmp_path):
    objective, given, message = ERRORS[name]
    path = tmp_path / "data.jsonl"
    if isinstance(given, str):
        path.write_text('"x"')
        path = given if ":" in given else tmp_path / given
    elif isinstance(given, bytes):
        path.write_bytes(given)
    else:
        write(given)
    with pytest.raises(ConfigError, match=message):
        open_rows(run(objective, str(path)), tokenizer)


def test_files_that_are_not_what_their_ending_says_are_refused(write, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"a.json holds a dict, expected a list of objects"):
        open_rows(run("sft", write({"a": 1}, "a.json")), tokenizer)
    (tmp_path / "b.json").write_text("[1,")
    with pytest.raises(ConfigError, match=r"b.json: not valid JSON"):
        open_rows(run("sft", str(tmp_path / "b.json")), tokenizer)
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"c.png is not UTF-8 text"):
        open_rows(run("pretrain", str(tmp_path / "c.png")), tokenizer)
    (tmp_path / "d.parquet").write_bytes(b"PAR")
    with pytest.raises(ConfigError, match=r"d.parquet (cannot be read as parquet|needs a package)"):
        open_rows(run("pretrain", str(tmp_path / "d.parquet")), tokenizer)


def test_a_fault_behind_the_checked_records_names_its_place_when_it_is_read(monkeypatch, write, tokenizer):
    monkeypatch.setattr("jaxseek.data.split.CHECKED", 2)
    rows = open_rows(run("sft", write([*QUESTIONS[:3], {"prompt": "a"}]), shuffle=False), tokenizer)
    with pytest.raises(ConfigError, match="line 4 has no column 'response'"):
        next(rows)


def test_fill_in_the_middle_needs_its_tokens(write, tmp_path):
    own = train_sentencepiece(DOCUMENTS, 300, tmp_path / "no_fim")
    with pytest.raises(ConfigError, match=r"data.fim_rate is 0.5, but the tokenizer has no <｜fim▁begin｜>"):
        open_rows(run("pretrain", write(DOCUMENTS), fim_rate=0.5), own)


# ---- A new tokenizer.


@pytest.mark.parametrize("objective", ["pretrain", "sft", "dpo"])
def test_a_tokenizer_is_trained_on_what_is_trained_on(objective, write, tmp_path):
    records = {"pretrain": DOCUMENTS, "sft": QUESTIONS, "dpo": PAIRS}[objective]
    config = run(objective, write(records), fim_rate=0.1).replace(tokenizer="train:320")
    first, second = (train_tokenizer(config, tmp_path / name) for name in "ab")
    assert first.vocab_size <= 320
    assert first.token_id(str(chat.FIM_HOLE)) is not None
    blobs = [(tmp_path / name / "tokenizer.model").read_bytes() for name in "ab"]
    assert blobs[0] == blobs[1]
    assert next(open_rows(config, second))["tokens"].max() < second.vocab_size


def test_the_size_of_a_new_tokenizer_must_be_a_number(write, tmp_path):
    config = run("pretrain", write(DOCUMENTS)).replace(tokenizer="train:big")
    with pytest.raises(ConfigError, match=r"tokenizer is 'train:big', expected train:SIZE"):
        train_tokenizer(config, tmp_path)


# ---- Data sets.


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"needs {SHARED / name}")
    return str(SHARED / name)


def test_gsm8k_becomes_rows(tokenizer):
    columns = {"prompt": "question", "response": "answer"}
    path = shared("gsm8k/data__train.jsonl")
    rows = open_rows(run("sft", path, columns=columns, length=2048, holdout=0.01), tokenizer)
    found = texts(next(rows), tokenizer)
    assert len(found) > 2
    assert all(whole.startswith(B + U) and "\n#### " in learnt for whole, learnt in found)
    assert rows.counts["examples"] == 7473 - 75


def test_the_preference_demos_become_pairs(tokenizer):
    columns = {"messages": "conversations", "role": "from", "content": "value"}
    roles = {"human": "user", "gpt": "assistant"}
    paths = [shared(f"dpo_demo/data__dpo_{language}_demo.json") for language in ("en", "zh")]
    rows = open_rows(run("dpo", paths, columns=columns, roles=roles, length=2048), tokenizer)
    row = next(rows)
    record = [r for path in paths for r in json.loads(Path(path).read_text("utf-8"))][int(row["index"])]
    learnt = [learnt for _, learnt in pair_texts(row, tokenizer)]
    assert learnt == [record[side]["value"] + E for side in ("chosen", "rejected")]
