"""Rewards score what they name, and no reward function stops a run."""

import os
import platform
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxseek.config.model import ConfigError
from jaxseek.config.rl import RewardConfig
from jaxseek.rl.problem import Answer, Problem
from jaxseek.rl.rewards.answers import exact, final_answer, last_boxed, normal
from jaxseek.rl.rewards.countdown import countdown
from jaxseek.rl.rewards.format import format, length
from jaxseek.rl.rewards.language import language
from jaxseek.rl.rewards.mathematics import one_result
from jaxseek.rl.rewards.terms import Rewards
from jaxseek.rl.sandbox import seccomp


def answer(text, reference="", record=None, tokens=1, reason="stop"):
    thinking, mark, final = text.partition("</think>")
    problem = Problem("", reference, record or {})
    if not mark:
        return Answer(problem, text, None, text, tokens, reason)
    return Answer(problem, text, thinking.removeprefix("<think>"), final, tokens, reason)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("42", "42"),
        (" so it is\n42 \n", "so it is\n42"),
        ("<think>\\boxed{1}</think>so \\boxed{2}", "2"),
        ("<think>1</think>so 2", "so 2"),
        ("<think>\\boxed{1} and on", ""),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\boxed{1} and \boxed{2", ""),
        (r"\boxed{1} \boxed{\boxed{2}}", "2"),
        ("<answer>4", ""),
        ("<answer>4</answer><answer>4", ""),
        (r"\fbox{7}", "7"),
        ("work\n#### 1,234", "1,234"),
        ("#### 1\n#### 2\nmore", "2"),
        (r"<answer>5</answer> \boxed{6}", "5"),
        (r"<answer>1</answer><answer>so \boxed{2}</answer>", "2"),
        ("<think><answer>1</answer></think><answer>\n2\n</answer>", "2"),
    ],
)
def test_the_final_answer_is_found(text, result):
    assert final_answer(answer(text)) == result


def test_a_box_that_never_closes_is_none():
    assert last_boxed(r"\boxed{1") is None
    assert last_boxed("\\boxed{1\\") is None
    assert last_boxed("") is None


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("1000", "1,000", 1),
        ("$5", "5", 1),
        ("5.", "5", 1),
        ("5.00", "5", 1),
        (r"\$1,234,567.50", "1234567.5", 1),
        ("$5$", "5", 1),
        ("+3", "3", 1),
        ("-0", "0", 1),
        ("007", "7", 1),
        (".5", "0.50", 1),
        ("1{,}000", "1000", 1),
        ("-5", "5", 0),
        ("5%", "5", 0),
        ("1,00", "100", 0),
        ("1.5", "15", 0),
        ("50", "5", 0),
        ("9" * 40 + "1", "9" * 40 + "2", 0),
        ("1e3", "1000", 0),
        ("New   York\n", "New York", 1),
        ("new york", "New York", 0),
        ("", "0", 0),
        (".", "0", 0),
        ("$", "", 0),
        ("<think>5</think>6", "5", 0),
    ],
)
def test_exact_compares_text_and_numbers(text, reference, score):
    assert exact(answer(text, reference)) == score


def test_what_is_no_number_stays_as_it_is():
    assert [normal(t) for t in ("$x$", "1/2", "a  b.", "٣")] == ["$x$", "1/2", "a b.", "٣"]


@pytest.mark.parametrize(
    ("text", "plain", "tagged"),
    [
        ("<think>a</think>b", 1, 0),
        ("a</think>b", 1, 0),
        (" \n<think>\na\n</think>\n\nb", 1, 0),
        ("<think>a</think> <answer>b</answer>\n", 1, 1),
        ("a</think><answer>b</answer>", 1, 1),
        ("<think>a</think>so <answer>b</answer>", 1, 0),
        ("<think>a</think><answer> </answer>", 1, 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 1, 0),
        ("<think>a</think></answer>b<answer>", 1, 0),
        ("<think>a <answer>x</answer></think><answer>b</answer>", 1, 0),
        ("<think> </think>b", 0, 0),
        ("</think>b", 0, 0),
        ("<think>a</think> \n", 0, 0),
        ("<think>a", 0, 0),
        ("b", 0, 0),
        ("", 0, 0),
        ("hm <think>a</think>b", 0, 0),
        ("<think><think>a</think>b", 0, 0),
        ("<think>a</think>b</think>c", 0, 0),
        ("<think>a</think><think>b</think>c", 0, 0),
        ("</think>a<think>b", 0, 0),
    ],
)
def test_the_format_is_thinking_and_then_an_answer(text, plain, tagged):
    assert (format(answer(text), tags=False), format(answer(text), tags=True)) == (plain, tagged)


@pytest.mark.parametrize(
    ("thinking", "english"),
    [
        ("We add two numbers", 1.0),
        ("我们把两个数相加", 0.0),
        ("so 我们 add", 0.5),
        ("don't stop’s", 1.0),
        ("1 + 2 = 3", 1.0),
        ("", 1.0),
        ("x y z 我", 0.0),
        (r"\frac{1}{2} \times 我 number", 0.5),
        (r"number $\text{speed of light}$ 我", 0.5),
        ("it costs $5 and 我 $6", 0.75),
        (r"number \[ \text{speed of} \] 我", 0.5),
        ("number 我 ```python\nfor item in items: pass\n```", 0.5),
        ("number 我 `code here`", 0.5),
        ("да it", 0.5),
        ("über it", 1.0),
    ],
)
def test_language_is_a_share_of_words(thinking, english):
    reply = answer(f"<think>{thinking}</think>我我我 word")
    assert language(reply, "en") == pytest.approx(english)
    words = any(c.isalpha() for c in thinking) and not thinking.startswith("1")
    chinese = 1.0 - english if "да" not in thinking else 0.0
    assert language(reply, "zh") == pytest.approx(chinese if words else 1.0)


def test_without_thinking_the_whole_text_has_a_language():
    assert language(answer("我 word 我 word"), "zh") == 0.5


def test_length_falls_from_the_target_to_twice_as_much():
    lengths = [0, 100, 150, 200, 1000]
    assert [length(answer("", tokens=n), 100) for n in lengths] == [1.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("(3 + 5) * 7 - 1", 1),
        (r"<answer>7*(5+3) - 1</answer>", 1),
        (r"\boxed{(3+5) \times 7 - 1 = 55}", 1),
        ("$7×(5+3)−1$", 1),
        ("(3+5)*7-1 = 54", 0),
        ("(3+5)*7-1 = 1e999999999", 0),
        ("(3+5)*7-1 = 55 = 55", 0),
        ("55", 0),
        ("3*5*7 - 50", 0),
        ("(3+5)*7", 0),
        ("(3+5)*7-1-3+3", 0),
        ("(3+5)*7+-1", 0),
        ("(3+5)*7-1**1", 0),
        ("(3+5)*7-1//1", 0),
        ("(3+5)*7-1.0", 0),
        ("(3+5)7-1", 0),
        ("(3+5)*7-1)", 0),
        ("__import__('os').abort()", 0),
        ("(" * 150 + "1" + ")" * 3, 0),
        ("1/(3-3)*5*7", 0),
        ("", 0),
        ("()", 0),
        ("<think>(3+5)*7-1</think>", 0),
    ],
)
def test_countdown_uses_each_number_once(text, score):
    record = {"numbers": [1, 3, 5, 7], "target": 55}
    assert countdown(answer(text, record=record)) == score


def test_countdown_computes_in_fractions():
    record = {"numbers": [3, 3, 8, 8], "target": 24}
    assert countdown(answer("8/(3-8/3)", record=record)) == 1
    assert countdown(answer("8/(3-8/3)", record=record | {"target": 25})) == 0


# Reward functions for the workers: a module in a temporary folder.
FUNCTIONS = """
import ctypes, math, os, signal, subprocess, sys, time
import numpy as np

def by(trick):
    def function(answers):
        return [trick() if a.text == "bad" else float(len(a.text)) for a in answers]
    return function

def fail(): raise KeyError("no such thing")
def loop():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True: pass
def orphan():
    subprocess.Popen(["sleep", "1000"])
    time.sleep(1000)

raises = by(fail)
loops = by(loop)
hangs_in_c = by(lambda: sum(range(10**12)))
exits = by(lambda: os._exit(0))
leaves = by(lambda: sys.exit(0))
crashes = by(lambda: ctypes.string_at(0))
killed = by(lambda: os.kill(os.getpid(), signal.SIGKILL))
is_nan = by(lambda: math.nan)
is_inf = by(lambda: np.float32(math.inf))
is_text = by(lambda: "1.0")
is_complex = by(lambda: 1j)
is_huge = by(lambda: 10**400)
closes = by(lambda: os.closerange(0, 10_000))
leaves_children = by(orphan)

def only_bad(answers): return [1.0 if a.text == "bad" else None for a in answers]
def only_good(answers): return [None if a.text == "bad" else 2.0 for a in answers]
def empties(answers):
    answers.clear()
    return []
def mutates(answers):
    for a in answers:
        a.problem.record["numbers"].append(9)
        a.problem.record.clear()
    answers.reverse()
    return [1.0] * len(answers)
def short(answers): return [1.0] * sum(a.text != "bad" for a in answers)
def nothing(answers): return None
def counts(answers): return np.full(len(answers), len(answers), np.float32)
def prints(answers):
    print("{\\"values\\": [9]}"); os.write(1, b"noise\\n"); sys.stderr.write("more noise\\n")
    return [True for _ in answers]
def pid(answers): return [os.getpid()] * len(answers)
def imports(answers): return ["jax" in sys.modules] * len(answers)
not_a_function = 5
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    (folder / "reward_functions.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def python(function, **settings):
    return RewardConfig("python", function=f"reward_functions:{function}", **settings)


BATCH = [answer(text) for text in ("a", "bb", "bad", "ccc", "d")]


REASONS = {
    "raises": "KeyError: 'no such thing'",
    "loops": "no answer within 0.5 seconds",
    "hangs_in_c": "no answer within 0.5 seconds",
    "exits": "the process ended: exit status 0",
    "leaves": "SystemExit: 0",
    "crashes": "the process ended: exit status -11",
    "killed": "the process ended: exit status -9",
    "closes": "the process ended",
    "is_nan": "nan is not a finite number",
    "is_inf": "not a finite number",
    "is_text": "'1.0' is not a finite number",
    "is_complex": "a value of type complex is not a finite number",
    "is_huge": "a value of type int is not a finite number",
}


def test_only_the_answer_that_a_function_fails_on_has_no_score(functions):
    limit = {name: 0.5 if "within" in reason else 5.0 for name, reason in REASONS.items()}
    with Rewards([python(name, name=name, seconds=limit[name], weight=0.5) for name in REASONS]) as rewards:
        scores = rewards.score(BATCH)
    for name, reason in REASONS.items():
        assert np.array_equal(scores.parts[name], [1, 2, np.nan, 3, 1], equal_nan=True), name
        (failure,) = [f for f in scores.failures if f.reward == name]
        assert failure.index == 2
        assert reason in failure.reason
    np.testing.assert_allclose(scores.total, 0.5 * len(REASONS) * np.array([1, 2, np.nan, 3, 1]))


def test_the_wrong_number_of_rewards_fails_for_the_answer_that_lacks_one(functions):
    with Rewards([python("short"), python("nothing", name="none")], cpu_workers=1) as rewards:
        scores = rewards.score(BATCH)
    np.testing.assert_array_equal(scores.parts["python"], [1, 1, np.nan, 1, 1])
    assert np.isnan(scores.parts["none"]).all()
    assert [f.reason for f in scores.failures[:1]] == ["ValueError: 0 rewards for 1 answers"]
    assert [f.index for f in scores.failures] == [2, 0, 1, 2, 3, 4]


def test_workers_are_kept_replaced_and_ended(functions):
    with Rewards(
        [python("pid"), python("raises", name="raises"), python("exits", name="exits")], 1
    ) as rewards:
        first, second = (rewards.score(BATCH[:2]).parts["python"][0] for _ in range(2))
        assert first == second
        rewards.score(BATCH)
        last = int(rewards.score(BATCH[:2]).parts["python"][0])
        assert last != first  # `exits` took the first along
        os.kill(last, 0)
    for process in (int(first), last):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def group_exists(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_a_function_started_ends_with_it(functions):
    with Rewards([python("leaves_children", seconds=0.5)], 1) as rewards:
        (worker,) = rewards.pool.workers
        group = worker.process.pid
        assert group_exists(group)
        assert len(rewards.score(BATCH[2:3]).failures) == 1
    deadline = time.monotonic() + 5.0
    while group_exists(group):  # the kernel takes a moment to bury them
        assert time.monotonic() < deadline
        time.sleep(0.02)


def with_trainer(function):
    """The id of a worker that computes `function`, and the process that waits for it."""
    script = f"""if True:
        from jaxseek.rl.problem import Answer, Problem
        from jaxseek.rl.rewards.terms import Rewards
        from jaxseek.config.rl import RewardConfig

        config = RewardConfig("python", function="reward_functions:{function}", seconds=100.0)
        rewards = Rewards([config], 1)
        print(next(iter(rewards.pool.workers)).process.pid, flush=True)
        rewards.score([Answer(Problem("", ""), "bad", None, "bad", 1, "stop")])
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    trainer = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, text=True
    )
    with trainer.stdout:
        worker = int(trainer.stdout.readline())
    time.sleep(0.3)
    assert group_exists(worker)
    return worker, trainer


def test_workers_end_with_the_trainer(functions):
    """They do so on Linux even while a function keeps the interpreter's lock."""
    worker, trainer = with_trainer("hangs_in_c" if sys.platform == "linux" else "loops")
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 5.0
    while group_exists(worker):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_functions_get_chunks_and_may_print(functions, capfd):
    with Rewards(
        [python("counts", name="counts", weight=2.0), python("prints", name="prints")], 1
    ) as rewards:
        scores = rewards.score([answer(str(i)) for i in range(40)])
    assert scores.parts["counts"].tolist() == [16.0] * 32 + [8.0] * 8
    assert scores.parts["prints"].tolist() == [1.0] * 40
    assert scores.total.tolist() == [33.0] * 32 + [17.0] * 8
    assert scores.total.dtype == np.float64
    out, err = capfd.readouterr()
    assert out == ""
    assert "noise" in err


def test_workers_and_rewards_do_without_jax(functions):
    with Rewards([python("imports")], 1) as rewards:
        assert rewards.score(BATCH).total.tolist() == [0.0] * 5
    check = "import sys, jaxseek.rl.rewards.terms; sys.exit('jax' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", check], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_closing_does_not_wait_for_a_hanging_function(functions):
    from threading import Timer

    rewards = Rewards([python("loops", seconds=60.0)], 1)
    timer = Timer(0.5, rewards.close)
    timer.start()
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        rewards.score(BATCH)
    assert time.monotonic() - started < 10
    timer.join()
    rewards.close()


def test_the_terms_that_apply_to_an_answer_are_added(functions):
    configs = [python("only_bad", name="a"), python("only_good", name="b", weight=0.5)]
    with Rewards([*configs, RewardConfig("length", weight=0.0)], 1) as rewards:
        scores = rewards.score(BATCH)
    assert scores.total.tolist() == [1.0] * 5
    assert (scores.failures, scores.left_out) == ([], set())
    with Rewards([configs[0], RewardConfig("length", weight=0.0)], 1) as rewards:
        scores = rewards.score(BATCH)
    np.testing.assert_array_equal(scores.total, [np.nan, np.nan, 1, np.nan, np.nan])
    assert (scores.failures, scores.left_out) == ([], {0, 1, 3, 4})


def test_a_function_changes_nothing_that_the_trainer_holds(functions):
    batch = [answer("a", record={"numbers": [i]}) for i in range(4)]
    with Rewards([python("mutates", name="m"), python("empties", name="e"), python("pid")], 1) as rewards:
        scores = rewards.score(batch)
    assert [a.problem.record for a in batch] == [{"numbers": [i]} for i in range(4)]
    assert scores.parts["m"].tolist() == [1.0] * 4
    assert len(set(scores.parts["python"])) == 1
    assert {f.reason for f in scores.failures} == {"ValueError: 0 rewards for 1 answers"}


def test_a_broken_problem_is_named_once_and_its_answers_are_left_out(caplog):
    if sys.platform != "linux" or platform.machine() not in seccomp.MACHINES:
        pytest.skip("the sandbox needs Linux on x86_64 or aarch64")
    records = [{"tests": ["assert f() == 1"], "test_setup_code": setup} for setup in ("import no_such", "")]
    batch = [answer("```python\ndef f(): return 1\n```", record=records[i]) for i in (0, 0, 1)]
    with Rewards([RewardConfig("code", seconds=20.0)], 2) as rewards:
        scores = rewards.score(batch)
        rewards.score(batch)
    np.testing.assert_array_equal(scores.total, [np.nan, np.nan, 1])
    assert (scores.failures, scores.left_out) == ([], {0, 1})
    named = [r.getMessage() for r in caplog.records if "broken problem" in r.getMessage()]
    assert len(named) == len(rewards.broken) == 1
    assert "No module named 'no_such'" in named[0]


def test_a_weight_of_zero_only_reports(functions):
    with Rewards([RewardConfig("length"), python("is_nan", weight=0.0)], 1) as rewards:
        scores = rewards.score(BATCH)
    assert scores.total.tolist() == [1.0] * 5
    assert np.isnan(scores.parts["python"][2])


def test_cheap_rewards_start_no_process_and_fail_alone():
    problem = {"numbers": [1, 2], "target": 3}
    batch = [answer("1+2", record=problem), answer("1+2"), answer("2+2", record=problem)]
    with Rewards([RewardConfig("countdown"), RewardConfig("format", weight=0.1)]) as rewards:
        scores = rewards.score(batch)
        assert not rewards.pool.workers
    np.testing.assert_array_equal(scores.parts["countdown"], [1, np.nan, 0])
    np.testing.assert_array_equal(scores.total, [1, np.nan, 0])
    assert [(f.index, f.reward) for f in scores.failures] == [(1, "countdown")]
    assert "no numbers and target" in scores.failures[0].reason


def test_no_answers_have_no_scores():
    with Rewards([RewardConfig("exact")]) as rewards:
        scores = rewards.score([])
    assert scores.total.shape == scores.parts["exact"].shape == (0,)


def test_a_reward_model_is_called_in_this_process():
    with Rewards([RewardConfig("model")], model_score=lambda model, answers: [0.5] * 4 + [np.nan]) as rewards:
        scores = rewards.score(BATCH)
    np.testing.assert_array_equal(scores.total, [0.5] * 4 + [np.nan])
    assert [f.index for f in scores.failures] == [4]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "at least one"),
        ([RewardConfig("exact"), RewardConfig("exact")], "each its own `name`"),
        ([RewardConfig("exact", weight=float("nan"))], "weight nan must be finite"),
        ([RewardConfig("exact", seconds=0.0)], r"seconds 0\.0"),
        ([RewardConfig("code", megabytes=8)], "megabytes 8"),
        ([RewardConfig("model")], "needs a reward model"),
        ([RewardConfig("python", function="module")], "must be `module:function`"),
        ([RewardConfig("python", function="no_such_module:f")], "No module named 'no_such_module'"),
        ([RewardConfig("python", function="reward_functions:no_such")], "no attribute 'no_such'"),
        ([RewardConfig("python", function="reward_functions:not_a_function")], "cannot be called"),
    ],
)
def test_rewards_that_cannot_work_are_refused(functions, configs, message):
    with pytest.raises(ConfigError, match=message):
        Rewards(configs, 1)


def test_math_without_math_verify_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install math-verify"):
        Rewards([RewardConfig("math")])


MATH = [
    ("0.5", "1/2", 1),
    (r"\boxed{\frac{1}{2}}", "0.5", 1),
    (r"The answer is $\frac{1}{2}$.", "0.5", 1),
    ("first 3, then 4\nso the answer is 7", "7", 1),
    ("first 3, then 7\nso the answer is 4", "7", 0),
    (r"\frac12", r"\frac{1}{2}", 1),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1),
    (r"\boxed{(2, 1)}", "(1, 2)", 0),
    (r"\boxed{[1, 2)}", "[1, 2)", 1),
    (r"\boxed{(1, 2)}", "[1, 2)", 0),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1),
    (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1),
    (r"\boxed{x = 3}", "3", 1),
    (r"\boxed{5\text{ cm}}", "5", 1),
    (r"\boxed{120^\circ}", "120", 1),
    (r"\boxed{10\%}", "0.1", 1),
    (r"\boxed{\$18.00}", "18", 1),
    ("#### 1,800", "1800", 1),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", 1),
    (r"\boxed{Evelyn}", r"\text{Ann}", 0),
    (r"\boxed{3.14}", r"\pi", 0),
    (r"<think>\boxed{7}</think>\boxed{8}", "7", 0),
    (r"\boxed{}", "7", 0),
    ("", "7", 0),
    (r"\boxed{9^{9^{9^9}}}", "5", 0),
    (r"\boxed{2, 1}", "1, 2", 1),
    (r"\boxed{x = 1 \text{ and } x = 2}", "1, 2", 1),
    (r"\boxed{1, 2, 3}", "1, 2", 0),
    (r"\boxed{1 & \{1, 2\}}", "1, 2", 0),
    (r"\boxed{\left(1, 2\right)}", "(1, 2)", 1),
    (r"\boxed{y = 1 + 2x}", "y = 2x + 1", 1),
    (r"\boxed{x \ge 3}", "x > 3", 0),
    (r"\boxed{1 \pm \sqrt{2}}", r"1\pm\sqrt{2}", 1),
    (r"\boxed{\begin{pmatrix}1&2\end{pmatrix}}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}", 1),
    (r"\boxed{\frac{\sqrt3}2}", r"\frac{\sqrt{3}}{2}", 1),
    (r"\boxed{1 \frac{1}{2}}", "1.5", 1),
    (r"It is $\begin{pmatrix} 1 \\ 2 \end{pmatrix}$.", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1),
    (r"\boxed{(2,12)\cup(12,102)}", r"(2,12) \cup (12,102)", 1),
    (r"\boxed{11,\! 111}", "11111", 1),
    ("the answer is -5", "-5", 1),
    (r"\boxed{1{,}800}", "1800", 1),
]


def boxes(*contents):
    return [rf"\boxed{{{content}}}" for content in contents]


# The reference of each is 4.
HEDGES = [
    "3, 4", "4;3", "1 2 3 4", "4,4", "3\n4",
    "x=3\nx = 4", "3=4", "4 or 5", "1 3", "3 4", "4 (or 3)", "3\n4 or 5", "x=3, x=4",
    "either 3 or 4", "$3$ and $4$", r"\(4\) or \(5\)", "The answer is 3 or 4", "The result is 3 = 4",
    "#### 3, 4", "#### 3 or 4", r"\boxed{4", "<answer>4", r"\boxed{4} \boxed{", r"\boxed{4}, no: \boxed{5}",
    *boxes(
        "3=4", "x=3=4", "3, 4", "(3,4)", r"\{4\}", r"\{3,4\}", "x=3, x=4", r"x \in \{4\}", r"4 \pm 0",
        "4 ± 0", r"3 \text{ or } 4", r"3\text{ and }4", "4 OR 5", r"3 \cup 4", r"3 \lor x=4", r"3 \mid 4",
        "5 || 4",
        "3 & 4", r"x=3 \Rightarrow 4", r"3 \to 4", r"4 \ne 3", r"3\neq4", r"4 \leq 4", "1 3", r"1\quad 3",
        r"1\\3", "{1}{3}", r"1 \text{ cm } 3", "4 apples 3 pears",
        "x=3!x=4", r"3\circ 4", r"3\frac 4", "3 ** 4", "4_3", r"3^{} 4", r"\text{3\sqrt 4}", r"3\right 4",
        r"3\ldots 4", r"3\sim4", r"3 \foo 4", "3 # 4",
        "5→4", r"\pi = 4", r"\begin{cases}4\\4\end{cases}", r"5 \approx 4", "3 maybe 4", r"4\,or\,5",
    ),
]  # fmt: skip
SINGLE = [
    "4", "x=4", "The result is 4", "so x = 4", "The answer is $4$.", "The answer is:\n\n4", "it is 4",
    "答案是 4", "#### **4**", "#### 4 dollars", "#### **$4**", "#### 4 eggs per day", "**4**",
    "she sold 2 + 2 = 4 clips",
    "2 + 2 = 4\n4", "first 3, then 1\nso the answer is 4", "It has 4 cm^2 left", r"\boxed{3}, no: \boxed{4}",
    "<answer>3</answer><answer>4</answer>", "<answer> 4 </answer>", r"The answer is \frac{8}{2}.",
    *boxes(
        "x=4", "2+2", "2+2=4", "n = 2+2 = 4", "f(2)=4", r"\angle A = 4", r"\theta = 4", r"\max(3,4)", "|-4|",
        r"\frac{8}{2}", r"\frac82", r"\frac 8 2", r"\sqrt{16}", r"\log_{2}{16}", "x_1 = 4", r"4\text{ cm}",
        r"4\ \mathrm{m/s}", r"\$4", r"4^\circ", r"\text{The answer is } 4", "4.0",
    ),
]  # fmt: skip


def test_a_hedge_is_no_answer_and_one_result_is():
    pytest.importorskip("math_verify")
    with Rewards([RewardConfig("math", seconds=20.0)], 2) as rewards:
        scores = rewards.score([answer(text, "4") for text in HEDGES + SINGLE])
    assert scores.failures == []
    paid = {text for text, score in zip(HEDGES + SINGLE, scores.total) if score}
    assert paid & set(HEDGES) == set()
    assert set(SINGLE) - paid == set()


UNITS = [
    r"\boxed{",
    "<answer>",
    r"\frac{",
    "answer ",
    "answer is ",
    "$",
    "$$",
    "**",
    "#### ",
    "####\n",
    r"\[",
    r"\(",
]
UNITS += [
    "\\",
    "{",
    "4, ",
    "1 ",
    " ",
    "\n",
    "</answer>",
    "9",
    r"\text{",
    "`",
    "<think>",
    "</think>",
    "```",
    "(",
]


@pytest.mark.parametrize("unit", UNITS)
def test_reading_an_answer_takes_time_in_proportion(unit):
    text = "x</think>" + unit * (10**6 // len(unit))
    reply = answer(text, "4", {"numbers": [1, 2], "target": 3})
    rewards = [exact, countdown, lambda a: format(a, tags=True), lambda a: language(a, "en")]
    rewards += [lambda a: one_result(a.final, "4")]
    started = time.monotonic()
    assert [bool(reward(reply)) for reward in rewards[:2]] == [False, False]
    for reward in rewards[2:]:
        reward(reply)
    assert time.monotonic() - started < 4.0  # of a fifth of a second; a square of the length takes hours


def test_mathematics_is_compared_by_value():
    pytest.importorskip("math_verify")
    with Rewards([RewardConfig("math", seconds=6.0)], 1) as rewards:
        scores = rewards.score([answer(text, reference) for text, reference, _ in MATH])
    assert scores.failures == []
    wrong = [(case, s) for case, s in zip(MATH, scores.total) if s != case[2]]
    assert wrong == []
