"""Tasks: answers worked out again, what is held out, prompts word for word, and records that do not fit."""

import itertools
import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
import tokenizers

from jaxseek.config.model import ConfigError
from jaxseek.config.run import RunConfig
from jaxseek.data.dataset import open_rows
from jaxseek.data.encode import encode_talk
from jaxseek.rl.arithmetic import WORDS, character_tokenizer, demonstration, demonstrations, set_apart
from jaxseek.rl.rewards.answers import last_boxed
from jaxseek.rl.tasks import open_task
from jaxseek.tokenizer import chat
from jaxseek.tokenizer.tokenizer import Tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
# R1 paper, table 1.
TABLE_1 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
    "assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: "
    "{prompt}. Assistant:"
)


def run(kind, seed=0, reward="exact", data=None, **task):
    return RunConfig.from_dict(
        {
            "objective": "grpo", "model": "m", "out": "o", "steps": 1, "seed": seed, "data": data or {},
            "task": {"kind": kind, "template": "plain"} | task, "rewards": [{"kind": reward}],
        }
    )  # fmt: skip


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


@pytest.fixture
def made(tmp_path):
    """A task of 20 questions in a file, whose answers are their numbers."""
    path = write(tmp_path / "made.jsonl", [{"prompt": f"q{i}", "answer": i, "extra": [i]} for i in range(20)])

    def open_made(seed=0, held_out=5, data=None, **task):
        return open_task(run("jsonl", seed, data={"train": path} | (data or {}), held_out=held_out, **task))

    return open_made


def chain(text):
    """(steps, answer) of `6-2*7=`, character by character."""
    value, steps = int(text[0]), []
    for i in range(1, len(text) - 1, 2):
        digit = int(text[i + 1])
        value = {"+": value + digit, "-": value - digit, "*": value * digit}[text[i]] % 10
        steps.append(value)
    assert text.endswith("=")
    return steps, value


def exactly(expression):
    """The value of an expression of whole numbers, as a fraction."""
    assert re.fullmatch(r"[\d+\-*/() ]+", expression)
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression), {"Fraction": Fraction})


# ---- Made problems.


@pytest.mark.parametrize("terms", [2, 6, 9])
def test_an_arithmetic_answer_is_the_chain_worked_from_left_to_right(terms):
    task = open_task(run("arithmetic", terms=terms))
    for problem in [*map(task.problem, range(300)), *task.held_out]:
        steps, answer = chain(problem.prompt)
        assert len(problem.prompt) == 2 * terms
        assert (problem.answer, problem.record["steps"]) == (str(answer), steps)
    assert chain("6-2*7*3-2*7=") == ([4, 8, 4, 2, 4], 4)
    assert {p.prompt[1] for p in map(task.problem, range(300))} == set("+-*")


@pytest.mark.parametrize("terms", [2, 3, 4, 6, 12])
def test_a_countdown_answer_uses_each_number_once_and_gives_the_target(terms):
    task = open_task(run("countdown", terms=terms))
    for problem in [*map(task.problem, range(300)), *task.held_out]:
        record = problem.record
        assert sorted(map(int, re.findall(r"\d+", problem.answer))) == sorted(record["numbers"])
        assert exactly(problem.answer) == record["target"]
        assert 1 <= record["target"] <= 999
        assert len(record["numbers"]) == terms
        assert min(record["numbers"]) >= 1
        assert max(record["numbers"]) <= 99
        assert f"equals {record['target']}." in problem.prompt
        assert ", ".join(map(str, record["numbers"])) in problem.prompt
    signs = "".join(problem.answer for problem in map(task.problem, range(300)))
    assert set("+-*/") <= set(signs)


@pytest.mark.parametrize("kind", ["arithmetic", "countdown"])
def test_a_made_problem_is_a_function_of_seed_and_number(kind):
    first, again, other = (open_task(run(kind, seed)) for seed in (3, 3, 4))
    ahead = again.problem(1000)
    forward = [first.problem(i) for i in range(50)]
    assert [again.problem(i) for i in reversed(range(50))] == forward[::-1]
    assert first.problem(1000) == ahead
    assert [other.problem(i) for i in range(50)] != forward
    assert len({problem.prompt for problem in forward}) > 45
    assert first.size is None
    with pytest.raises(IndexError, match="problem -1"):
        first.problem(-1)


@pytest.mark.parametrize(("kind", "terms"), [("arithmetic", 2), ("arithmetic", 6), ("countdown", 2)])
def test_no_seed_trains_on_what_is_held_out_and_all_hold_out_the_same(kind, terms):
    tasks = [open_task(run(kind, seed, terms=terms, held_out=200)) for seed in (0, 1, 2)]
    held = [problem.prompt for problem in tasks[0].held_out]
    assert all(task.held_out == tasks[0].held_out for task in tasks)
    assert len(set(held)) == len(held) > 20
    assert len(held) == 200 or terms == 2
    trained = {task.problem(i).prompt for task in tasks for i in range(1500)}
    assert not trained & set(held)


def test_countdown_holds_out_every_order_of_the_numbers():
    task = open_task(run("countdown", terms=2, held_out=400))

    def key(problem):
        return (*sorted(problem.record["numbers"]), problem.record["target"])

    trained = {key(task.problem(i)) for i in range(3000)}
    assert not trained & set(map(key, task.held_out))


def test_a_small_space_holds_out_what_it_has():
    task = open_task(run("arithmetic", terms=2, held_out=500))
    every = {f"{a}{sign}{b}=" for a in range(10) for b in range(10) for sign in "+-*"}
    assert {problem.prompt for problem in task.held_out} == {text for text in every if set_apart(text)}
    assert 20 < len(task.held_out) < 60


# ---- Templates.


def r1_zero(messages):
    return "".join(chat.render("r1_zero", messages))


def test_templates_lay_a_problem_out_word_for_word(made):
    data = {"shuffle": False}
    plain = made(data=data).problem(0).prompt
    assert re.fullmatch(r"q\d+", plain)
    assert r1_zero(made(data=data, template="r1_zero").problem(0).prompt) == TABLE_1.replace(
        "{prompt}", plain
    )
    assert made(data=data, template="chat").problem(0).prompt == [{"role": "user", "content": plain}]
    assert made(data=data, template="chat", system="Be brief.").problem(0).prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": plain},
    ]
    assert made(data=data, instruction="Box it.").problem(0).prompt == plain + "\nBox it."
    assert made(data=data, instruction=" Box it.").problem(0).prompt == plain + " Box it."
    zero = r1_zero(made(data=data, template="r1_zero", instruction="Box it").held_out[0].prompt)
    assert "\nBox it. Assistant:" in zero


def test_a_conversation_is_a_problem_for_chat_alone(tmp_path):
    turns = [
        ("system", "Hm."),
        ("user", "1+1?"),
        ("assistant", "2"),
        ("user", "And 2+2?"),
        ("assistant", "5"),
    ]
    talk = [{"role": role, "content": content} for role, content in turns]
    path = write(
        tmp_path / "talk.jsonl", [{"messages": talk, "answer": "4"}] * 2 + [{"prompt": "q", "answer": "1"}]
    )
    data = {
        "train": path,
        "eval": write(tmp_path / "e.jsonl", [{"prompt": "e", "answer": "1"}]),
        "shuffle": False,
    }
    prompt = open_task(run("jsonl", data=data, template="chat", instruction="Now")).problem(0).prompt
    assert prompt == [*talk[:3], {"role": "user", "content": "And 2+2?\nNow"}]
    with pytest.raises(ConfigError, match=r'line 1 is a conversation of 4 messages; task.template = "plain"'):
        open_task(run("jsonl", data=data))
    with pytest.raises(ConfigError, match="line 1 has a system message of its own"):
        open_task(run("jsonl", data=data, template="chat", system="Be brief."))


# ---- Files.


def test_a_file_is_shuffled_anew_each_epoch_and_seed(made):
    task, again, other = made(seed=3), made(seed=3), made(seed=4)
    late = again.problem(44)
    epochs = [[task.problem(15 * e + i).prompt for i in range(15)] for e in range(3)]
    assert task.size == 15
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert late.prompt == epochs[2][14]
    assert [again.problem(i).prompt for i in range(15)] == epochs[0]
    assert [other.problem(i).prompt for i in range(15)] != epochs[0]
    assert task.held_out == again.held_out == other.held_out
    assert len(task.held_out) == 5
    assert not {p.prompt for p in task.held_out} & set(epochs[0])
    in_order = made(data={"shuffle": False})
    numbers = [int(in_order.problem(i).answer) for i in range(15)]
    assert numbers == sorted(numbers)
    assert in_order.problem(3).record == {
        "prompt": f"q{numbers[3]}",
        "answer": numbers[3],
        "extra": [numbers[3]],
    }


def test_holdout_and_eval_say_what_is_held_out(made, tmp_path):
    task = made(held_out=3, data={"holdout": 0.5})
    assert (task.size, len(task.held_out)) == (10, 3)
    records = [{"prompt": f"{letter}{i}", "answer": i} for i in range(4) for letter in "eq"]
    task = made(held_out=3, data={"eval": write(tmp_path / "eval.jsonl", records)})
    assert (task.size, task.dropped, len(task.held_out)) == (16, 4, 3)
    assert {task.problem(i).prompt for i in range(16)} == {f"q{i}" for i in range(4, 20)}


def test_a_problem_that_is_also_held_out_is_left_out_of_training(tmp_path):
    path = write(tmp_path / "twice.jsonl", [{"prompt": f"q{i % 10}", "answer": i % 10} for i in range(30)])
    task = open_task(run("jsonl", data={"train": path}, held_out=4))
    held = {p.prompt for p in task.held_out}
    assert not held & {task.problem(i).prompt for i in range(task.size)}
    assert task.size == 3 * (10 - len(held))


def test_gsm8k_and_math_answers_are_read_as_the_data_sets_write_them(tmp_path):
    def answers(kind, records, **data):
        train = write(tmp_path / "train.jsonl", [*records, records[0]])
        spare = {"question": "q", "problem": "q", "prompt": "q", "answer": "#### 5", "a": r"\boxed{5}"}
        data = {"train": train, "eval": write(tmp_path / "eval.jsonl", [spare]), "shuffle": False} | data
        task = open_task(run(kind, data=data))
        return [task.problem(i).answer for i in range(len(records))], task.problem(0).prompt

    gsm = [{"question": "How?", "answer": f"Well, 1+1=<<1+1=2>>2.\n#### {n}"} for n in ("72", "1,234 ", "-5")]
    assert answers("gsm8k", gsm) == (["72", "1234", "-5"], "How?")
    own = [{"prompt": "How?", "answer": "#### 3"}]
    assert answers("gsm8k", own) == (["3"], "How?")
    solved = [
        {"problem": "P", "solution": r"so \boxed{1} or \boxed{\frac{1}{2} \text{ of } \{3\}}."},
        {"problem": "P", "solution": r"\boxed{3}", "answer": "4"},
        {"problem": "P", "answer": r"It is $\boxed{x^{2}}$"},
    ]
    assert answers("math", solved) == ([r"\frac{1}{2} \text{ of } \{3\}", "4", "x^{2}"], "P")
    other = [{"task": "T", "a": r"\boxed{7}"}, {"task": "T", "a": 8.0}]
    columns = {"prompt": "task", "answer": "a"}
    with pytest.raises(ConfigError, match=r"eval.jsonl, line 1 has no column 'task'"):
        answers("math", other, columns=columns)
    spare = write(tmp_path / "spare.jsonl", [{"task": "U", "a": "1"}])
    assert answers("math", other, columns=columns, eval=spare) == (["7", "8"], "T")


def test_a_number_is_an_answer_and_two_columns_are_a_prompt(tmp_path):
    values = [72.0, 72, 0.5, -3.0, 0, " 7 "]
    records = [{"Body": "There are 2.", "Question": "How many?", "Answer": value} for value in values]
    spare = write(tmp_path / "eval.jsonl", [{"Body": "b", "Question": "q", "Answer": 1}])
    columns = {"prompt": "Body+Question", "answer": "Answer"}
    data = {
        "train": write(tmp_path / "n.jsonl", records),
        "eval": spare,
        "columns": columns,
        "shuffle": False,
    }
    task = open_task(run("jsonl", data=data))
    assert [task.problem(i).answer for i in range(6)] == ["72", "72", "0.5", "-3", "0", "7"]
    assert task.problem(0).prompt == "There are 2.\nHow many?"
    assert task.problem(0).record == records[0]


def test_an_answer_may_be_missing_where_no_reward_compares_it(tmp_path):
    records = [{"prompt": f"q{i}", "test_list": ["assert True"]} for i in range(4)]
    records += [{"prompt": "r", "answer": 0}, {"prompt": "s", "answer": None}]
    data = {"train": write(tmp_path / "c.jsonl", records), "shuffle": False}
    task = open_task(run("jsonl", reward="code", data=data, held_out=1))
    found = {p.prompt: p for p in [*task.held_out, *map(task.problem, range(5))]}
    assert {name: p.answer for name, p in found.items()} == dict.fromkeys(
        ["q0", "q1", "q2", "q3", "s"], ""
    ) | {"r": "0"}
    assert found["q0"].record["test_list"] == ["assert True"]
    with pytest.raises(ConfigError, match="no column 'answer'"):
        open_task(run("jsonl", data=data, held_out=1))
    named = data | {"columns": {"answer": "anwser"}}
    with pytest.raises(ConfigError, match="no column 'anwser'"):
        open_task(run("jsonl", reward="code", data=named, held_out=1))


GOOD = [{"prompt": f"q{i}", "answer": "1"} for i in range(4)]
ROW, GSM = {"prompt": "q", "answer": "1"}, {"question": "q", "answer": "#### 1"}
BAD = {
    "no prompt": ("jsonl", [{"promt": "q", "answer": "1"}] * 4, {}, r'no column .prompt.*prompt = "promt"'),
    "no answer": ("jsonl", [{"prompt": "q", "Answer": ""}] * 4, {}, r'no column .answer.*answer = "Answer"'),
    "no question": ("gsm8k", [{"Question": "q", "answer": "#### 1"}] * 4, {}, "no column 'question'"),
    "part": ("jsonl", GOOD, {"columns": {"prompt": "body+prompt"}}, "no column 'body'"),
    "empty answer": ("jsonl", [*GOOD, ROW | {"answer": " "}], {}, "line 5: the answer in answer is empty"),
    "empty prompt": ("jsonl", [*GOOD, ROW | {"prompt": " "}], {}, "line 5: the prompt is empty"),
    "list": ("jsonl", [*GOOD, ROW | {"answer": [1]}], {}, r"answer is \[1\], expected a string or a number"),
    "bool": ("jsonl", [*GOOD, ROW | {"answer": True}], {}, "answer is True, expected a string or a number"),
    "nan": ("jsonl", [*GOOD, ROW | {"answer": float("nan")}], {}, "answer is nan, expected"),
    "no mark": ("gsm8k", [GSM | {"answer": "1"}] * 4, {}, r'does not end in "#### 72".*kind = "jsonl"'),
    "mark alone": ("gsm8k", [GSM | {"answer": "so\n####"}] * 4, {}, "the answer in answer is empty"),
    "no box": ("math", [{"problem": "q", "solution": r"\boxed{1"}] * 4, {}, r"holds no whole \\boxed"),
    "too few": ("jsonl", GOOD[:2], {}, r"task.held_out 2 of 2 problems leaves none to train on; lower it"),
    "all": ("jsonl", GOOD, {"holdout": 1.0}, r"data.holdout 1.0 of 4 problems leaves none"),
    "one question": ("jsonl", [GOOD[0]] * 4, {}, r"all 2 problems of data.train are held out too"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "records", "data", "message"), BAD.values(), ids=BAD)
def test_records_that_do_not_fit_are_refused(kind, records, data, message, tmp_path):
    path = write(tmp_path / "bad.jsonl", records)
    with pytest.raises(ConfigError, match=message):
        open_task(run(kind, data={"train": path} | data, held_out=2))


TESTED = {"prompt": "q", "tests": [{"input": "1", "output": "1"}]}
CODE = {
    "another form": (
        [*GOOD, TESTED, ROW | {"tests": {"inputs": ["1"]}}],
        r"line 6: tests is .*inputs.*expected a",
    ),
    "in eval": (
        [*GOOD, TESTED, ROW | {"test_list": "assert f"}],
        r"line 6: test_list is 'assert f', expected a",
    ),
    "none": (GOOD, r"kind code needs problems with tests; no record of data.train or data.eval has a column"),
}


@pytest.mark.parametrize(("records", "message"), CODE.values(), ids=CODE)
def test_tests_that_the_code_reward_cannot_read_are_refused(records, message, tmp_path):
    path = write(tmp_path / "code.jsonl", records)
    with pytest.raises(ConfigError, match=message):
        open_task(run("jsonl", reward="code", data={"train": path}, held_out=2))


def test_a_file_may_have_problems_with_and_without_tests(tmp_path):
    path = write(tmp_path / "code.jsonl", [*GOOD, TESTED])
    assert open_task(run("jsonl", reward="code", data={"train": path}, held_out=2)).size
    with pytest.raises(ConfigError, match=r'tests, which task.kind = "arithmetic" has not'):
        open_task(run("arithmetic", reward="code"))


def test_boxes_are_found_with_their_braces():
    assert last_boxed(r"\boxed{1} and \boxed{\text{a \} b}{2}}") == r"\text{a \} b}{2}"
    assert last_boxed(r"\boxed{1") is None
    assert last_boxed("1") is None
    assert last_boxed(r"\boxed{}") == ""


needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data sets in ../shared/data")


@needs_shared
def test_gsm8k_as_released():
    data = {"train": str(SHARED / "gsm8k/data__train.jsonl"), "eval": str(SHARED / "gsm8k/data__test.jsonl")}
    task = open_task(run("gsm8k", data=data, template="r1_zero"))
    assert (task.size + task.dropped, len(task.held_out)) == (7473, 500)
    answers = {task.problem(i).answer for i in range(task.size)}
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", answer) for answer in answers)
    lines = (SHARED / "gsm8k/data__train.jsonl").read_text("utf-8").splitlines()
    first = open_task(run("gsm8k", data=data | {"shuffle": False})).problem(0)
    assert (first.prompt, first.answer) == (json.loads(lines[0])["question"], "72")


@needs_shared
def test_math_and_svamp_as_released():
    task = open_task(run("math", data={"train": str(SHARED / "math500/math500__test.jsonl")}, held_out=100))
    assert task.size == 400
    for i in range(task.size):
        record = task.problem(i).record
        assert task.problem(i).answer == record["answer"].strip()
        assert last_boxed(record["solution"]) is not None
    columns = {"prompt": "Body+Question", "answer": "Answer"}
    data = {"train": str(SHARED / "svamp/svamp__test.jsonl"), "columns": columns}
    task = open_task(run("jsonl", data=data, held_out=100))
    assert task.size + task.dropped == 900
    assert all(re.fullmatch(r"-?\d+", task.problem(i).answer) for i in range(task.size))


# ---- Demonstrations and their tokenizer.


def test_demonstrations_show_the_steps_of_training_problems_as_often_as_asked():
    records = demonstrations(2000, shown=0.2, seed=1)
    thoughts = 0
    for record in records:
        steps, answer = chain(record["prompt"])
        assert not set_apart(record["prompt"])
        thinking = ";".join(map(str, steps))
        assert record["response"] in (f"<think>{thinking}</think>{answer}", f"<think></think>{answer}")
        thoughts += thinking in record["response"]
    assert 0.16 < thoughts / 2000 < 0.24
    assert records == demonstrations(2000, shown=0.2, seed=1)
    assert records != demonstrations(2000, shown=0.2, seed=2)
    assert all("<think></think>" not in r["response"] for r in demonstrations(50))
    assert all("<think></think>" in r["response"] for r in demonstrations(50, shown=0.0))
    held = {p.prompt for p in open_task(run("arithmetic", terms=2)).held_out}
    assert not held & {r["prompt"] for r in demonstrations(2000, terms=2)}


def test_a_demonstration_can_be_given_in_words():
    problem = open_task(run("arithmetic", template="chat")).problem(7)
    steps = problem.record["steps"]
    for language, words in WORDS.items():
        said = demonstration(problem, True, language)
        assert said == f"<think>{';'.join(words[s] for s in steps)}</think>{problem.answer}"
    assert demonstration(problem, False, "zh") == f"<think></think>{problem.answer}"
    assert WORDS["zh"][4] + ";" + WORDS["zh"][8] == "四;八"
    assert all("\u4e00" <= word <= "\u9fff" for word in WORDS["zh"])


def test_mixed_words_change_their_language_at_most_once():
    kinds = []
    for record in demonstrations(800, words="mixed"):
        steps, _ = chain(record["prompt"])
        thinking = record["response"].removeprefix("<think>").partition("</think>")[0].split(";")
        languages = ["en" if word.isascii() else "zh" for word in thinking]
        assert thinking == [WORDS[name][step] for name, step in zip(languages, steps, strict=True)]
        kinds.append(languages[0] if len(set(languages)) == 1 else "both")
        assert sum(a != b for a, b in itertools.pairwise(languages)) == (kinds[-1] == "both")
    assert 140 < kinds.count("en") < 260
    assert 140 < kinds.count("zh") < 260
    assert 340 < kinds.count("both") < 460
    assert demonstrations(3, terms=2, words="mixed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"words": "fr"}, "words is 'fr', expected one of digits, en, zh, mixed"),
        ({"count": 0}, "count is 0, expected 1 or more"),
        ({"terms": 1}, "terms is 1, expected 2 or more"),
        ({"shown": 2.0}, "shown is 2.0, expected 0 to 1"),
    ],
)
def test_bad_arguments_for_demonstrations_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        demonstrations(**{"count": 1} | arguments)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("characters")
    character_tokenizer(path)
    return path


def test_the_character_tokenizer_gives_back_what_it_is_given(directory, tmp_path):
    tokenizer = Tokenizer.from_dir(directory)
    assert tokenizer.vocab_size == 42
    assert tokenizer.template is None
    assert not tokenizer.add_bos
    texts = [
        "6-2*7*3-2*7=",
        " 1 + 2;",
        "四;八;零",
        "four;eight;zero",
        "sixseven7七",
        "",
        *map("".join, WORDS.values()),
    ]
    for text in [*texts, *(r["prompt"] + r["response"] for r in demonstrations(200, words="mixed"))]:
        ids = tokenizer.encode_trusted(text)
        assert tokenizer.decode(ids) == text
        plain = tokenizer.encode(re.sub("</?think>", "", text))
        assert tokenizer.decode(plain) == re.sub("</?think>", "", text)
    assert len(tokenizer.encode("6-2*7*3-2*7=")) == 12
    assert len(tokenizer.encode("four;eight")) == 3
    assert len(tokenizer.encode("四;八")) == 3
    assert tokenizer.encode("a5") == [tokenizer.token_id("<unk>"), tokenizer.token_id("5")]
    tokenizer.save(tmp_path)
    assert Tokenizer.from_dir(tmp_path).encode("6-2=") == tokenizer.encode("6-2=")


def test_the_file_alone_gives_the_same_ids(directory):
    ours, theirs = (
        Tokenizer.from_dir(directory),
        tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")),
    )
    for record in demonstrations(100, words="mixed"):
        text = record["prompt"] + record["response"]
        ids = theirs.encode(text).ids
        assert ids == ours.encode_trusted(text)
        assert theirs.decode(ids) == text
    assert theirs.token_to_id("<pad>") == ours.pad_id == 0
    assert (theirs.token_to_id("<eos>"),) == ours.eos_ids


def test_thinking_tags_are_control_tokens_in_replies_and_never_in_prompts(directory):
    tokenizer = Tokenizer.from_dir(directory)
    think, close, eos = (tokenizer.token_id(t) for t in (str(chat.THINK), str(chat.THINK_END), "<eos>"))
    talk = [
        {"role": "user", "content": "<think>1=<eos>"},
        {"role": "assistant", "content": "<think>4;8</think>8"},
    ]
    encoded = encode_talk(talk, tokenizer)
    prompt = tokenizer.encode("<think>1=<eos>")
    tokens = encoded.tokens.tolist()
    assert not {think, close, eos} & set(prompt)
    assert tokens[: len(prompt)] == prompt
    assert tokens[len(prompt) :] == [think, *tokenizer.encode("4;8"), close, *tokenizer.encode("8"), eos]
    assert encoded.weights.tolist() == [0.0] * len(prompt) + [1.0] * (len(tokens) - len(prompt))


def test_demonstrations_are_a_source_of_training_rows(directory):
    source = "python:jaxseek.rl.arithmetic:demonstrations?count=40&shown=0.5&terms=4&words=en"
    cfg = RunConfig.from_dict(
        {"objective": "sft", "model": "m", "out": "o", "steps": 1, "data": {"train": source, "length": 24,
         "packing": False}}
    )  # fmt: skip
    tokenizer = Tokenizer.from_dir(directory)
    rows = list(open_rows(cfg, tokenizer, repeat=False))
    expected = {r["prompt"] + r["response"] for r in demonstrations(40, 0.5, 4, words="en")}
    assert {tokenizer.decode(row["tokens"]) for row in rows} <= expected
    assert len(rows) == 40
