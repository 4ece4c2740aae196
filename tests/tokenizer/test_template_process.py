"""Chat templates in their process: rendered alike, and any fault is an error, soon and in bounded memory."""

import os
import signal
import time

import pytest

from jaxseek.tokenizer import template_process
from jaxseek.tokenizer.template_process import TemplateFault, run_template, template_variables

NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ 1/0 }}", "ZeroDivisionError"),
        ("{{ range(10**9)|list }}", "OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ 'a'.ljust(10**10) }}", "MemoryError"),
        ("{{ '%9999999999d' % 1 }}", "MemoryError"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "writes more than"),
        ("{{ " + "(" * 9999, "RecursionError"),
        ("{{ none + 1 }}", "TypeError"),
        ("{{ x.y }}", "refused the conversation: 'x' is undefined"),
        ("{{ raise_exception('no tools') }}", "refused the conversation: no tools"),
        ("{% if %}", "refused the conversation"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_whatever_a_template_raises_is_one_fault(source, why):
    with pytest.raises(TemplateFault, match=why) as fault:
        run_template(source, {"messages": []})
    assert len(str(fault.value)) < 1200
    assert run_template("{{ a }}\r\n", {"a": "é\ud800\u2028"}) == "é\ud800\u2028"


def test_a_template_without_end_is_stopped_and_the_next_is_rendered():
    start = time.process_time()
    with pytest.raises(TemplateFault, match="took more than"):
        run_template(NESTED, {})
    assert time.process_time() - start < 1
    assert run_template("{{ 1 + 1 }}", {}) == "2"


def test_the_process_is_started_anew_after_it_was_killed():
    run_template("", {})
    os.kill(template_process._process.pid, signal.SIGKILL)
    template_process._process.wait()
    assert run_template("{{ 1 }}", {}) == "1"


def test_the_variables_of_a_template_are_told_without_running_it():
    assert template_variables("{% for m in messages %}{{ m + name }}{% endfor %}") == {"messages", "name"}
    assert template_variables("{{ 'a'|center(10**10) }}") == set()
