import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer
from transformers import PreTrainedTokenizerBase

from locft.data import chat
from locft.data.chat import render_chat
from locft.errors import ModelError

QUESTION = [{"role": "user", "content": "Who wrote the play? "}]
CONVERSATION = [*QUESTION, {"role": "assistant", "content": "Ann"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *CONVERSATION, *QUESTION]

NEEDS_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

# Templates as models have them, cut to what they do.
TEMPLATES = {
    "llama 3": (
        "{{- bos_token }}\n"
        "{%- if not date_string is defined %}\n"
        "    {%- set date_string = '26 Jul 2024' %}\n"
        "{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n"
        "{%- else %}\n"
        "    {%- set system_message = '' %}\n"
        "{%- endif %}\n"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}\n"
        "{%- if tools is not none %}{{- 'Environment: ipython\n' }}{%- endif %}\n"
        "{{- 'Today Date: ' + date_string + '\n\n' + system_message + '<|eot_id|>' }}\n"
        "{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] | trim + '<|eot_id|>' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n"
        "{%- endif %}\n"
    ),
    "chatml with a system prompt of its own": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "mistral": (
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content'] %}\n"
        "    {%- set loop_messages = messages[1:] %}\n"
        "{%- else %}\n"
        "    {%- set loop_messages = messages %}\n"
        "{%- endif %}\n"
        "{{- bos_token }}\n"
        "{%- for message in loop_messages %}\n"
        "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
        "        {{- raise_exception('roles must alternate') }}\n"
        "    {%- endif %}\n"
        "    {%- if message['role'] == 'user' %}\n"
        "        {%- if loop.first and system_message is defined %}\n"
        "            {{- ' [INST] ' + system_message + '\n\n' + message['content'] + ' [/INST]' }}\n"
        "        {%- else %}\n"
        "            {{- ' [INST] ' + message['content'] + ' [/INST]' }}\n"
        "        {%- endif %}\n"
        "    {%- else %}\n"
        "        {{- ' ' + message['content'] + eos_token }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
    ),
    "gemma": (
        "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
        "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
        "{% for message in messages %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '')"
        " + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "today's date": (
        "{%- if strftime_now is defined %}{%- set date = strftime_now('%d %b %Y') %}"
        "{%- else %}{%- set date = '26 Jul 2024' %}{%- endif %}"
        "{{ date }}\n"
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    ),
    "loop controls": (
        "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}"
        "{{ message.content }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "a namespace and a macro": (
        "{%- macro turn(role, content) -%}<|{{ role }}|>{{ content }}<|end|>{%- endmacro -%}"
        "{%- set ns = namespace(last=-1) -%}"
        "{%- for message in messages if message.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endfor -%}"
        "{%- for message in messages %}{{ turn(message.role, message.content) }}{% endfor -%}"
        "{{ ns.last }}{{ '<|assistant|>' if add_generation_prompt }}"
    ),
    "generation tags": (
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Answer:{% endif %}"
    ),
    "json of all that it is given": (
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
        "{{ [bos_token, eos_token, pad_token, tools, documents, unk_token is defined] | tojson }}"
    ),
    "white space": (
        "\n  {% for message in messages %}\n\t{{ message.content }}\n  {% endfor %}\r\n{# nothing #}\n\n"
    ),
    "reasoning": (
        "{% for message in messages %}{{ message.content.split('</think>')[-1].lstrip('\n') }}"
        "{% if message.reasoning_content is string %}{{ message.reasoning_content }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<think>\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '</think>' }}{% endif %}"
        "{% endif %}"
    ),
}


def with_template(template: Any, **options: Any) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer(**{"bos_token": "<|start|>", **options})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def good() -> PreTrainedTokenizerBase:
    return with_template(CHAT_TEMPLATE)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_MAX_CPU_S", 0.5)


def renders(tokenizer: PreTrainedTokenizerBase) -> bool:
    expected = "<|start|>user\nWho wrote the play? <|stop|>\n<|start|>assistant\n"
    return render_chat(tokenizer, QUESTION, prompt_only=True) == expected


# What is rendered


@pytest.mark.parametrize("prompt_only", [True, False])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_is_rendered_as_transformers_does(template: str, prompt_only: bool) -> None:
    tokenizer = with_template(template)
    options: Any = {"tokenize": False, "add_generation_prompt": prompt_only}
    for messages in (QUESTION, CONVERSATION, SYSTEM):
        before = tokenizer.apply_chat_template(messages, **options)
        rendered = render_chat(tokenizer, messages, prompt_only=prompt_only)
        # Midnight may strike between the two.
        assert rendered in (before, tokenizer.apply_chat_template(messages, **options))
        assert "Who wrote the play?" in rendered


PROMPTS = {
    "empty": "",
    "lines": "two\nlines\r\n",
    "a script without spaces": "日本の首都は",
    "emoji and accents": "👩‍🚀 café",
    "a template": "{{ 1 + 1 }}",
    "control characters": "\x00\x1b[31m\u2028",
    "what JSON escapes": '"\\',
    "half a character": "\ud800",
    "long": "x" * 99_999,
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_reaches_the_text_as_it_is(good: PreTrainedTokenizerBase, prompt: str) -> None:
    rendered = render_chat(good, [{"role": "user", "content": prompt}], prompt_only=False)
    assert rendered == f"<|start|>user\n{prompt}<|stop|>\n"


def test_of_several_templates_the_default_one_is_rendered() -> None:
    tokenizer = with_template({"tool_use": "tools", "default": "{{ messages[0].content }}!"})
    assert render_chat(tokenizer, QUESTION, prompt_only=True) == "Who wrote the play? !"


def test_special_tokens_that_a_tokenizer_lacks_are_undefined() -> None:
    tokenizer = with_template("{{ bos_token is defined }} {{ eos_token }}", bos_token=None)
    assert render_chat(tokenizer, QUESTION, prompt_only=True) == "False <|end|>"


def test_one_template_leaves_nothing_behind_for_the_next(good: PreTrainedTokenizerBase) -> None:
    setting = with_template("{% set leak = namespace(x=1) %}{% set messages = [] %}{{ leak.x }}")
    assert render_chat(setting, QUESTION, prompt_only=True) == "1"
    asking = with_template("{{ leak is defined }} {{ messages | length }}")
    assert render_chat(asking, QUESTION, prompt_only=True) == "False 1"


# What is refused


def loops(depth: int, body: str = "") -> str:
    return "{% for i in range(100000) %}" * depth + body + "{% endfor %}" * depth


FAILING = {
    "a syntax error": ("{% for %}", "Expected an expression, got 'end of statement block'"),
    "an unknown filter": ("{{ messages | rhyme }}", r"No filter named 'rhyme'\."),
    "an undefined value": ("{{ messages.nothing.more }}", "'list object' has no attribute 'nothing'"),
    "an exception of its own": ("{{ raise_exception('roles must rhyme') }}", "roles must rhyme"),
    "an exception without text": ("{{ raise_exception('') }}", "TemplateError"),
    "an exception of several lines": ("{{ raise_exception('\n one\ntwo') }}", "one"),
    "an exception that is no text": ("{{ raise_exception([1]) }}", r"\[1\]"),
    "a long exception": ("{{ raise_exception('a' * 10**7) }}", "a{300}"),
    "division by zero": ("{{ 1 // 0 }}", ".*division.*by zero"),
    "a class": (
        "{{ ''.__class__.__mro__ }}",
        "access to attribute '__class__' of 'str' object is unsafe.",
    ),
    "globals": ("{{ lipsum.__globals__['os'].getpid() }}", "access to attribute '__globals__'.*unsafe."),
    "a class by format": (
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "access to attribute '__class__'.*",
    ),
    "changing what it is given": ("{{ messages.append(1) }}", "access to attribute 'append'.*unsafe."),
    "another file": ("{% include '/etc/passwd' %}", "no loader for this environment specified"),
    "a range without end": ("{{ range(10**9) | list }}", "Range too big.*"),
    "a macro that calls itself": (
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "maximum recursion.*",
    ),
    "deep nesting": ("{% if 1 %}" * 999 + "{% endif %}" * 999, "maximum recursion depth exceeded.*"),
    "deep brackets": (
        "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
        "maximum recursion depth exceeded.*",
    ),
    "loops within loops": (loops(25), "too many statically nested blocks.*"),
    "no default template": (
        {"a": "1", "b": "2"},
        "This model has multiple chat templates with no default.*",
    ),
}


@pytest.mark.parametrize(("template", "reason"), FAILING.values(), ids=FAILING)
def test_a_template_that_fails_is_refused_with_its_reason(
    good: PreTrainedTokenizerBase, template: Any, reason: str
) -> None:
    with pytest.raises(ModelError, match=f"^this model's chat template fails: (?:{reason})$"):
        render_chat(with_template(template), QUESTION, prompt_only=True)
    assert renders(good)


BOMB = (
    "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
)

TOO_MUCH = {
    "loops without output": (loops(3), "takes more than 0.5 s of computing"),
    "a power": ("{{ 10 ** (10 ** 10) }}", "takes more than 0.5 s of computing"),
    "a macro that calls itself twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
        "takes more than 0.5 s of computing",
    ),
    "a long text": ("{{ 'a' * 10**12 }}", "takes more than 256 MiB of memory"),
    "a padded text": ("{{ '{:>999999999}'.format(1) }}", "takes more than 256 MiB of memory"),
    "a text that doubles": (BOMB.replace("START", "'ab'"), "takes more than .*"),
    "a list that doubles": (BOMB.replace("START", "[0]"), "takes more than .*"),
    "an exception without end": ("{{ raise_exception('a' * 2 * 10**8) }}", "takes more than .*"),
    "output at once": ("{{ 'a' * 1000001 }}", "writes more than 1,000,000 characters"),
    "output in small pieces": (loops(1, "0123456789a"), "writes more than 1,000,000 characters"),
    "output without end": (loops(3, "a"), "takes more than .*"),
}


@NEEDS_LINUX
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("template", "excess"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_template_that_goes_too_far_is_refused(
    good: PreTrainedTokenizerBase, template: str, excess: str, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = f"^this model's chat template {excess} for one prompt, and is refused: use --format raw$"
    with pytest.raises(ModelError, match=expected):
        render_chat(with_template(template), QUESTION, prompt_only=True)
    assert renders(good)
    assert capfd.readouterr() == ("", "")


def test_a_text_may_be_as_long_as_the_bound() -> None:
    tokenizer = with_template("{{ '𝄞' * 1000000 }}")
    assert render_chat(tokenizer, QUESTION, prompt_only=True) == "𝄞" * 1_000_000


@pytest.mark.usefixtures("impatient")
def test_the_bound_of_time_is_for_one_prompt_and_not_for_all() -> None:
    slow = with_template("{% for i in range(100000) %}{% set x = i * i %}{% endfor %}done")
    start = time.monotonic()
    while time.monotonic() - start < 0.5:
        assert render_chat(slow, QUESTION, prompt_only=True) == "done"


# The process that renders


@pytest.mark.usefixtures("impatient")
def test_threads_each_get_their_own_answers() -> None:
    templates = [f"{number} {{{{ messages[0].content }}}}" for number in range(8)]
    templates[3] = loops(3)

    def ask(template: str) -> list[str]:
        tokenizer = with_template(template)
        try:
            chats = ([{"role": "user", "content": str(i)}] for i in range(50))
            return [render_chat(tokenizer, each, prompt_only=True) for each in chats]
        except ModelError as error:
            return [str(error)]

    with ThreadPoolExecutor(len(templates)) as pool:
        answers = list(pool.map(ask, templates))
    [refusal] = answers.pop(3)
    assert "0.5 s of computing" in refusal
    assert answers == [[f"{number} {i}" for i in range(50)] for number in (0, 1, 2, 4, 5, 6, 7)]


def test_a_process_that_was_killed_is_an_error_once(good: PreTrainedTokenizerBase) -> None:
    assert renders(good)
    process = chat._RENDERER._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ModelError, match=r"ended with status -9\. Try again, or use --format raw"):
        renders(good)
    assert renders(good)


def test_an_answer_that_was_not_waited_for_is_not_taken_for_the_next(
    good: PreTrainedTokenizerBase,
) -> None:
    slow = with_template(loops(2) + "late")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    assert renders(good)  # so that the process is there when the interrupt comes
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            render_chat(slow, QUESTION, prompt_only=True)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert renders(good)


def test_a_process_that_does_not_start_is_an_error(
    good: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat._RENDERER.close()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ModelError, match=r"does not start: .*No such file.*/nowhere/python"):
        renders(good)
    monkeypatch.undo()
    assert renders(good)


# A stand-in for a tokenizer, so that a script starts at once.
SCRIPT = """
import os, sys
from types import SimpleNamespace
from locft.data import chat

def render(template, prompt="Q"):
    tokenizer = SimpleNamespace(get_chat_template=lambda: template, special_tokens_map={})
    return chat.render_chat(tokenizer, [{"role": "user", "content": prompt}], prompt_only=True)

def say(*words):
    print(*words, flush=True)

ECHO = "{{ messages[0].content }}"
say(render(ECHO, "first"))
say(chat._RENDERER._process.pid)
"""


def start(code: str, folder: Path) -> "subprocess.Popen[str]":
    """Run a script in a folder, as an installed command is run: without the folder's modules."""
    return subprocess.Popen(
        [sys.executable, "-P", "-W", "error", "-c", SCRIPT + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        start_new_session=True,
    )


def is_alive(process_id: int) -> bool:
    try:  # an orphan may stay a zombie where nobody waits for it
        return "(zombie)" not in Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return False


@NEEDS_LINUX
def test_a_script_needs_no_guard_and_leaves_no_process(tmp_path: Path) -> None:
    # Nor is a module in the working directory taken for one that the process imports.
    for name in ("json", "locft", "jinja2", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError")
    with start("say(os.path.exists(f'/proc/{chat._RENDERER._process.pid}'))", tmp_path) as script:
        output, errors = script.communicate(timeout=60)
    assert (script.returncode, errors) == (0, "")
    text, process_id, was_alive = output.split()
    assert (text, was_alive) == ("first", "True")
    assert not is_alive(int(process_id))


@NEEDS_LINUX
def test_a_forked_process_renders_by_a_process_of_its_own(tmp_path: Path) -> None:
    code = """
child = os.fork()
if child == 0:
    say(all(render(ECHO, f"child {i}") == f"child {i}" for i in range(200)))
    say(chat._RENDERER._process.pid)
    sys.exit()
say(all(render(ECHO, f"parent {i}") == f"parent {i}" for i in range(200)))
os.waitpid(child, 0)
say(render(ECHO, "last"))
"""
    with start(code, tmp_path) as script:
        output, errors = script.communicate(timeout=60)
    assert (script.returncode, errors) == (0, "")
    words = output.split()
    process_ids = [int(word) for word in words if word.isdecimal()]
    assert [word for word in words if not word.isdecimal()] == ["first", "True", "True", "last"]
    assert len(set(process_ids)) == 2
    assert not any(is_alive(process_id) for process_id in process_ids)


@NEEDS_LINUX
@pytest.mark.parametrize("template", ["ECHO", f"'{loops(3)}'"], ids=["waiting", "rendering"])
def test_a_killed_script_leaves_no_process(tmp_path: Path, template: str) -> None:
    code = f"""
import time
chat._MAX_CPU_S = 1
say("now")
render({template})
time.sleep(60)
"""
    with start(code, tmp_path) as script:
        assert script.stdout is not None
        _, process_id, _ = (script.stdout.readline() for _ in range(3))
        time.sleep(0.2)
        assert is_alive(int(process_id))
        script.kill()
        script.communicate()
    deadline = time.monotonic() + 30
    while is_alive(int(process_id)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_interrupt_from_the_terminal_leaves_the_process_to_its_parent(tmp_path: Path) -> None:
    code = """
import signal
signal.signal(signal.SIGINT, lambda *_: None)
os.killpg(0, signal.SIGINT)
say(render(ECHO, "second"))
"""
    with start(code, tmp_path) as script:
        output, _ = script.communicate(timeout=60)
    assert output.split()[::2] == ["first", "second"]
