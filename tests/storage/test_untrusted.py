"""Reading files from elsewhere: each fault is one error that names the file, at a bounded cost."""

import os

import pytest

from jaxseek.storage import untrusted
from jaxseek.storage.untrusted import expect, parse_json, parse_toml, read_bytes, read_json


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b'{"a": ', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' stands twice in one object"),
        (b'{"b": [{"a": 1, "a": 1}]}', "'a' stands twice"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' + b"[" * 65 + b"]" * 65 + b"}", "nested too deep"),
        (b"9" * 5000, "not valid JSON"),
        (b'{"a": "\xff"}', "utf-8"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b"[1]", r"holds \[1\], expected a JSON object"),
        (b"null", "holds None, expected a JSON object"),
    ],
)
def test_what_is_no_json_object_is_told_with_the_file(text, why):
    with pytest.raises(ValueError, match=f"^a.json: .*{why}") as error:
        parse_json(text, "a.json")
    assert len(str(error.value)) < 300


def test_json_is_read_with_a_byte_order_mark_with_pairs_of_surrogates_and_as_deep_as_is_usual():
    assert parse_json(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}', "") == {"a": "😀"}
    assert parse_json('\ufeff{"a": 1}', "") == {"a": 1}
    assert parse_json("[" * 60 + "]" * 60, "", kind=list)
    assert parse_json("5", "", kind=object) == 5


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a = [" + "[" * 5000, "nested too deep"),
        ("a" + ".a" * 100 + " = 1", "nested too deep"),
        ("a" + ".a" * 100_000 + " = 1", "dots"),
        ("a = 1\na = 2", "Cannot overwrite"),
        (b"\xff", "utf-8"),
        ("a = " + "9" * 5000, "digits"),
        ("a = 2020-02-31", "Invalid date"),
    ],
)
def test_what_is_no_toml_is_told_with_the_file(text, why):
    with pytest.raises(ValueError, match=f"^a.toml: not valid TOML .*{why}"):
        parse_toml(text, "a.toml")


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path, monkeypatch):
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name, what in (("folder", "a directory"), ("pipe", "a pipe"), ("zero", "a device")):
        with pytest.raises(ValueError, match=f"{name}.json: is {what}, expected a file"):
            read_json(tmp_path / f"{name}.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")
    (tmp_path / "large").write_bytes(b"[" * 101)
    with pytest.raises(ValueError, match="large: is larger than 100 bytes"):
        read_bytes(tmp_path / "large", most=100)
    assert len(read_bytes(tmp_path / "large", most=101)) == 101


FORM = {"a": int, "b": {str: [int]}, "c?": (str, {"d": float}, None), "e?": bool}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"b": {}}, "has no a, expected a whole number from 0 on"),
        ({"a": -1, "b": {}}, "a is -1, expected a whole number"),
        ({"a": True, "b": {}}, "a is True, expected a whole number"),
        ({"a": 2**63, "b": {}}, "a is 9223372036854775808, expected a whole number"),
        ({"a": 1, "b": []}, r"b is \[\], expected an object"),
        ({"a": 1, "b": {"x": [1, 2.5]}}, r"b.x\[1\] is 2.5, expected a whole number"),
        ({"a": 1, "b": {}, "c": 5}, "c is 5, expected text or an object or null"),
        ({"a": 1, "b": {}, "c": {"d": float("nan")}}, "c.d is nan, expected a number"),
        ({"a": 1, "b": {}, "c": {"d": 10**400}}, "c.d is 1000.*, expected a number"),
        ({"a": 1, "b": {}, "e": 0}, "e is 0, expected true or false"),
        ([], r"holds \[\], expected an object"),
    ],
)
def test_what_has_another_form_is_told_by_key(value, message):
    with pytest.raises(ValueError, match=f"^a.json: {message}"):
        expect(value, FORM, "a.json")


def test_what_has_the_form_is_returned_with_keys_beyond_it():
    for more in ({}, {"c": None}, {"c": "x"}, {"c": {"d": 1}, "e": False, "z": object()}):
        value = {"a": 0, "b": {"x": [], "y": [1]}, **more}
        assert expect(value, FORM, "") is value


def test_values_in_messages_are_short():
    assert len(untrusted.brief({"a": ["x" * 10_000] * 10_000})) < 500
