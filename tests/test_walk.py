"""`.ci/walk`: a README's marked commands run as printed, in a bare environment, until one fails."""

import subprocess
import sys
from pathlib import Path

import pytest

WALK = Path(__file__).parent.parent / ".ci" / "walk"
README = """
<!-- walk -->
```bash
export KEPT=yes   # by the next block, too
for i in 1 2; do
    echo "number $i"
done
test -z "${SECRET:-}" && test -e pyproject.toml
git clone -q REPO_URL again && ls again
```

```bash
echo unmarked
```

<!-- walk: needs=lab -->
```bash
echo "the lab"
```

<!-- walk -->
```bash
python - <<'EOF'
import os, sys

print("venv", sys.prefix == os.environ["VIRTUAL_ENV"], os.environ["KEPT"])
EOF
LAST
echo after
```
"""


@pytest.fixture
def walk(tmp_path, monkeypatch):
    """Walks a README whose last block ends with the given command."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "pyproject.toml").touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "start"]):
        subprocess.run([*git, *command], cwd=checkout, check=True)
    monkeypatch.setenv("SECRET", "of the user")

    def walked(readme, *options):
        (tmp_path / "README.md").write_text(readme)
        command = [WALK, tmp_path / "README.md", "--python", sys.executable, "--checkout", checkout, *options]
        return subprocess.run([sys.executable, *command], capture_output=True, text=True)

    return walked


def test_marked_blocks_run_in_one_shell_with_nothing_of_the_users(walk):
    done = walk(README.replace("LAST", "true"))
    assert done.returncode == 0, done.stderr
    for line in (
        "number 2",
        "pyproject.toml",
        "venv True yes",
        "after",
        "$ export KEPT=yes   # by the next block, too",
    ):
        assert line in done.stdout.splitlines()
    assert "unmarked" not in done.stdout
    assert "the lab" not in done.stdout
    assert done.stdout.count(" s\n") >= 7  # each command's time


@pytest.mark.parametrize("failing", ["(exit 3)", "(exit 3) && echo on", "(exit 3) | cat"])
def test_the_first_command_that_fails_ends_it_with_its_code(walk, failing):
    done = walk(README.replace("LAST", failing), "--has", "lab")
    assert done.returncode == 3
    assert "the lab" in done.stdout.splitlines()
    assert "after" not in done.stdout.splitlines()


def test_a_readme_without_marks_or_with_one_above_no_block_is_an_error(walk):
    assert "no block is marked" in walk("# nothing").stderr
    assert "must stand directly above" in walk("<!-- walk -->\n\n```bash\necho\n```\n").stderr
