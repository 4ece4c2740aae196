"""Output of the command line: to a pipe, to a terminal, and to nobody."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from jaxseek.cli import info
from jaxseek.cli.main import VERBS, main
from jaxseek.cli.writer import Writer
from jaxseek.machine.terminal import table


def test_a_reader_that_leaves_is_no_error_and_a_full_disk_is_one(capsys, monkeypatch):
    for argv in (["info", "--list"], ["info", "tiny-v3"], ["info", "tiny-v3", "--json"]):
        for unbuffered in (False, True):
            reader, writer = os.pipe()
            os.close(reader)
            with open(writer, "w") as stream:
                stream.reconfigure(write_through=unbuffered)
                monkeypatch.setattr(sys, "stdout", stream)
                assert main(argv) == 0
        with open("/dev/full", "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            assert main(argv) == 1
        monkeypatch.setattr(sys, "stdout", None)  # as after >&-
        assert main(argv) == 0
        sys.stdout.close()
    monkeypatch.undo()
    assert capsys.readouterr().err.count("No space left on device") == 3


def test_a_pipe_gets_a_reply_byte_for_byte_and_a_terminal_no_control_sequence(monkeypatch):
    reply = "<think>x[:100:2]\x1b]0;title\x07</think> :smile:\n\tgcc\rend\x9b2J é"
    for terminal in (False, True):
        stream = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="")
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stdout", stream)
        out = Writer()
        for show in (out.plain, out.reasoning(False)):
            for start in range(0, len(reply), 3):
                show(reply[start : start + 3])
            out.end()
        out.json({"text": reply})
        shown = stream.buffer.getvalue().decode()
        whole, thought, line = reply + "\n", reply[7:].replace("</think> ", "\n\n"), shown.splitlines()[-1]
        if not terminal:
            assert shown.startswith(f"{whole}[thinking] {thought}\n")
        else:
            assert "x[:100:2]␛]0;title␇" in shown
            unstyled = re.sub("\x1b\\[[012]m", "", shown)
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", unstyled)
        assert json.loads(line) == {"text": reply}
        assert not re.search("[\x00-\x1f\x7f-\x9f]", line)


def test_tables_show_text_as_it_is(capsys):
    table("[b]:smile:[/red]", {"[/x]": "a\x1b[2Jb"})
    shown = capsys.readouterr().out
    assert "[b]:smile:[/red]" in shown
    assert "[/x]" in shown
    assert "a␛[2Jb" in shown


def test_letters_that_the_terminal_lacks_are_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(info, "run", lambda args: print("é"))
    assert main(["info", "x"]) == 0
    assert stream.buffer.getvalue() == b"\\xe9\n"


def test_help_imports_no_jax_and_every_file_of_a_verb_is_listed():
    script = (
        "import sys\nfrom jaxseek.cli.main import main\n"
        "try: main(['--help'])\nfinally: assert not {'jax', 'rich'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = Path(info.__file__).parent
    verbs = {path.stem for path in folder.glob("*.py") if "\ndef add(parser" in path.read_text()}
    assert verbs == set(VERBS)
    assert all(f"\n    {verb}" in done.stdout for verb in VERBS)
