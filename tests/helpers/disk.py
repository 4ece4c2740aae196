"""Files beneath a directory, and a disk that fails while a conversion writes them."""

from jaxseek_convert.files import Writer


def tree(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


class Interrupted(Exception):
    pass


def stop_after(monkeypatch, writes, error=Interrupted):
    """A disk that fails after so many writes."""
    genuine, count = Writer.write, iter(range(10**9))

    def write(self, *args):
        if next(count) >= writes:
            raise error
        genuine(self, *args)

    monkeypatch.setattr(Writer, "write", write)
